"""Answers in a given form: they are what was asked for, by other programs' judgement, whatever the model prefers."""

import json
import os
import random
import re
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from published_tokenizers import FAMILIES, save
from rank_pool import RankPool
from tiny import write_checkpoint

from llama import Llama, LlamaError
from llama.bench.schemas import as_response_format as of_schema
from llama.bench.schemas import draw_schema, is_prefix
from llama.engine.grammar import Grammars, Words
from llama.parallel import is_group_leader
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenizer import Tokenizer

OPTIONS: dict[str, Any] = {"max_seq_len": 2048, "max_batch_size": 8, "device": "cpu", "dtype": "float32"}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {"enum": ["é", "東京", "🙂"]}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
WORDS = ["\0\x7f\u2028/'", "über", '🙂 "quoted" \\ \n', "a"]
FORMS: dict[str, tuple[dict[str, Any], str]] = {  # a format, and a regular expression for its texts
    "regex": ({"type": "regex", "regex": "[a-c]{3,9}é"}, "[a-c]{3,9}é"),
    "choice": ({"type": "choice", "choice": WORDS}, "|".join(map(re.escape, WORDS))),
    "lark": ({"type": "grammar", "grammar": 'start: "a" " " B? "c"\nB: /b{1,4}/'}, "a b{0,4}c"),
}


def nest(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return of_schema(schema)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def llama(directory: Path) -> Llama:
    return Llama.build(directory, **OPTIONS)


@pytest.fixture
def prompt(llama: Llama) -> list[int]:
    return llama.tokenizer.encode("hi there", bos=True, eos=False)


def test_answers_to_bounded_schemas_are_whole_and_valid(llama: Llama, prompt: list[int]) -> None:
    schemas = [draw_schema(random.Random(i)) for i in range(25)]
    rows = [{"response_format": of_schema(schema), "seed": i} for i, schema in enumerate(schemas)]
    answers = llama.complete([prompt] * len(rows), temperature=1.0, top_p=1.0, n=4, rows=rows)
    assert len(answers) == 100
    for i, answer in enumerate(answers):
        assert answer.finish_reason == "stop" and answer.stop in llama.tokenizer.stop_tokens
        jsonschema.validate(json.loads(answer.text), schemas[i // 4])


def test_answers_to_unbounded_schemas_are_valid_or_begin_so(llama: Llama, prompt: list[int]) -> None:
    texts = {"type": "array", "items": {"type": "string"}}
    tree = {"type": "object", "additionalProperties": {"$ref": "#"}}
    formats = [of_schema(texts), of_schema(tree), of_schema({"type": "number"}), {"type": "json_object"}]
    rows = [{"response_format": form, "seed": i} for i, form in enumerate(formats)]
    answers = llama.complete([prompt] * 4, 40, 1.0, 1.0, n=6, rows=rows)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for i, answer in enumerate(answers):
        form = formats[i // 6]
        if answer.finish_reason == "stop":
            schema = form.get("json_schema", {}).get("schema", {"type": "object"})
            jsonschema.validate(json.loads(answer.text), schema)
        else:
            assert is_prefix(answer.text.rstrip("\ufffd"), form)


@pytest.mark.parametrize("name", FORMS)
def test_answers_match(llama: Llama, prompt: list[int], name: str) -> None:
    form, pattern = FORMS[name]
    answers = llama.complete([prompt], temperature=1.5, top_p=1.0, n=12, response_format=form)
    assert all(answer.finish_reason == "stop" and re.fullmatch(pattern, answer.text) for answer in answers)
    assert len({answer.text for answer in answers}) > 1
    (likeliest,) = llama.text_completion(["hi"], temperature=0, response_format=form)
    assert re.fullmatch(pattern, likeliest["generation"])


def test_each_row_has_its_own(llama: Llama, prompt: list[int]) -> None:
    """In one batch, beside a row that is free; a row's text is what it is alone; streams yield the same."""
    rows: list[dict[str, Any]] = [{"response_format": form, "seed": 3} for form, _ in FORMS.values()]
    rows += [{"response_format": {"type": "text"}, "seed": 3}, {"seed": 3}]
    answers = llama.complete([prompt] * 5, 30, 1.0, 1.0, rows=rows)
    assert all(re.fullmatch(pattern, answers[i].text) for i, (_, pattern) in enumerate(FORMS.values()))
    assert answers[3].tokens == answers[4].tokens and answers[3].finish_reason == "length"
    for row, answer in zip(rows, answers, strict=True):
        assert llama.complete([prompt], 30, 1.0, 1.0, **row)[0].tokens == answer.tokens
    texts = [""] * 5
    for steps in llama.stream([prompt] * 5, 30, 1.0, 1.0, rows=rows):
        for step in steps:
            texts[step.row] += step.text
    assert texts == [answer.text for answer in answers]


def test_chats_and_other_settings(llama: Llama, prompt: list[int]) -> None:
    """Stop texts and lengths act as always; a token that is to end an answer ends it where the form may end."""
    (chat,) = llama.chat_completion([[{"role": "user", "content": "Hi"}]], response_format=of_schema(PERSON))
    jsonschema.validate(json.loads(chat["generation"]["content"]), PERSON)
    digits: dict[str, Any] = {"response_format": {"type": "regex", "regex": "[0-9]{3,}x"}}
    (cut,) = llama.complete([prompt], 2, **digits)
    assert cut.finish_reason == "length" and cut.text.isdigit()
    (stopped,) = llama.complete([prompt], 400, 1.0, 1.0, stop=[*"0123456789"], **digits)
    assert (stopped.finish_reason, stopped.text) == ("stop", "")
    (ended,) = llama.complete([prompt], 400, 1.0, 1.0, response_format=FORMS["regex"][0], stop_token_ids=[ord("a")])
    assert re.fullmatch("[bc]{3,9}é", ended.text)
    with pytest.raises(LlamaError, match="no token is left to choose"):
        llama.complete([prompt], 400, logit_bias={ord("x"): -1e9}, min_gen_len=300, response_format=FORMS["lark"][0])


@pytest.mark.parametrize("form", [of_schema(PERSON), {"type": "json_object"}, FORMS["lark"][0]])
def test_proposals_change_nothing(llama: Llama, directory: Path, form: dict[str, Any]) -> None:
    """Those that are looked up, of which the form forbids some, and a draft model's."""
    prompt = llama.tokenizer.encode('{"name" :"ab" , "tags":"é"} a bb', bos=True, eos=False)
    options: dict[str, Any] = {"n": 4, "seed": 5, "response_format": form}
    expected = [answer.tokens for answer in llama.complete([prompt], 60, 0.8, 1.0, **options)]
    looked_up = llama.complete([prompt], 60, 0.8, 1.0, lookup_ngram=1, speculate_k=5, **options)
    assert [answer.tokens for answer in looked_up] == expected
    drafting = Llama.build(directory, **OPTIONS, draft_ckpt_dir=directory)
    assert [answer.tokens for answer in drafting.complete([prompt], 60, 0.8, 1.0, **options)] == expected
    assert drafting.acceptance is not None and drafting.acceptance > 0.5


def test_sequences_that_are_set_back_go_on(llama: Llama, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache is too small for all at once, the youngest are computed again later."""
    small = Llama(llama.model, llama.tokenizer, cache_tokens=200)
    scheduler = small.engine.stepper.scheduler
    set_back: list[int] = []
    plan_step = scheduler.plan

    def plan() -> Any:
        planned = plan_step()
        set_back.extend(planned.set_back)
        return planned

    monkeypatch.setattr(scheduler, "plan", plan)
    rows = [{"response_format": of_schema({"type": "string", "minLength": 60}), "seed": i} for i in range(8)]
    answers = [one.complete([prompt] * 8, 90, 1.0, 1.0, rows=rows) for one in (llama, small)]
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]] and set_back


def refuse(llama: Llama, form: object, **options: Any) -> str:
    with pytest.raises(LlamaError) as error:
        llama.complete([[1, 2]], 5, response_format=form, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (3, "response_format is 3, expected"),
        ({}, "response_format is {}, expected"),
        ({"type": "jsonobject"}, "has type 'jsonobject', expected one of .*; did you mean json_object"),
        ({"type": "json_object", "schema": {}}, "type json_object has the unknown key 'schema', known are type"),
        ({"type": "json_schema"}, "type json_schema has no json_schema, expected an object"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "expected an object with a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "stict": True}}, "has the unknown key 'stict'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "strict 1, expected true or false"),
        (of_schema({"type": "strin"}), "type json_schema: Invalid type: strin"),
        (of_schema({"not": {}}), 'Unimplemented keys: ."not".'),
        (of_schema({"enum": [float("nan")]}), "can't be written as JSON"),
        (of_schema({"minimum": 10**4000}), "number out of range"),
        (nest(200), "recursion limit exceeded"),
        (nest(4000), "can't be written as JSON"),
        (of_schema({"minimum": 10**5000}), "can't be written as JSON"),
        ({"type": "regex", "regex": "a("}, "type regex: .*unclosed group"),
        ({"type": "regex", "regex": "a" * 70_000}, "has 70030 bytes as JSON, expected at most 65536"),
        ({"type": "regex", "regex": "\ud800"}, "can't be written as JSON: .*surrogates not allowed"),
        ({"type": "choice", "choice": []}, "choice has choice .., expected a list of texts"),
        ({"type": "choice", "choice": "ab"}, "choice has choice 'ab', expected a list of texts"),
        ({"type": "grammar", "grammar": "start: nothing"}, 'type grammar: .*unknown name: "nothing"'),
        ({"type": "grammar", "grammar": "start: <|no_such_token|>"}, "unknown special token"),
    ],
)
def test_what_is_no_format_is_refused_before_a_pass(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, form: object, message: str
) -> None:
    monkeypatch.setattr(llama.engine.stepper, "carry_out", lambda *_: pytest.fail("a step was made"))
    assert re.search(message, refuse(llama, form))


def test_beams_are_refused(llama: Llama) -> None:
    found = refuse(llama, {"type": "json_object"}, temperature=0, num_beams=2)
    assert found == "num_beams is 2 and response_format was given: drop one of them"
    assert llama.complete([[1, 2]], 5, temperature=0, num_beams=2, response_format={"type": "text"})


def test_without_the_package_a_message_tells_how_to_get_it(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.engine.grammar.find_missing", lambda *modules: [*modules])
    found = refuse(llama, {"type": "json_object"})
    assert re.search(r"^response_format needs llguidance, which is not installed: run .*install llguidance", found)
    assert "llama-reference[grammar]" in found


@pytest.mark.parametrize(
    "form",
    [
        of_schema({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz"]}),
        {"type": "grammar", "grammar": 'start: s\ns: s s | s s s | "a" |'},
        {"type": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"},
        of_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    ],
)
def test_hostile_formats_end_soon(llama: Llama, prompt: list[int], form: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(LlamaError, match="response_format"):
        llama.complete([prompt], 200, response_format=form, logit_bias=dict.fromkeys(range(256, 512), -1000000000.0))
    assert time.process_time() - start < 20


def answer_on_ranks(directory: str) -> list[Any]:
    """What a rank gets by calls that all make, then by those of the first one alone. Only that one has llguidance."""
    if os.environ.get("RANK", "0") != "0":
        sys.modules["llguidance"] = None  # type: ignore[assignment]
    llama = Llama.build(directory, **OPTIONS)
    found: list[Any] = [llama.text_completion(["hi"], seed=1, response_format=of_schema(PERSON))]
    for form in ({"type": "regex", "regex": "("}, {"type": "grammar", "grammar": "start: <|no_such_token|>"}):
        try:
            llama.text_completion(["hi"], response_format=form)
        except LlamaError as e:
            found.append(str(e)[:40])
    if not is_group_leader():
        llama.engine.follow()
        return found
    with llama.engine.lead():
        assert llama.text_completion(["hi"], seed=1, response_format=of_schema(PERSON)) == found[0]
    return found


def test_ranks_follow_the_one_that_chooses(pool: RankPool, directory: Path, llama: Llama) -> None:
    expected = llama.text_completion(["hi"], seed=1, response_format=of_schema(PERSON))
    for found in pool.run(answer_on_ranks, str(directory), ranks=2).results:
        assert found[0] == expected and len(found) == 3


def test_characters_of_several_bytes_in_the_published_vocabulary(published: Tokenizer) -> None:
    """The tokens that may come next, at each place of some answers, by a comparison with all texts of the form."""
    texts = ["".join(chars) for length in (1, 2, 3) for chars in product("é東🙂 ", repeat=length)]
    wanted = [text.encode() for text in texts]
    matcher = Grammars(published).make_matcher({"type": "regex", "regex": "[é東🙂 ]{1,3}"})
    words = [published.decode_bytes(token) for token in range(published.n_words)]
    stops, control = published.stop_tokens, {*published.special_tokens.values()}
    for text in texts[::9]:
        answer = published.encode(text, bos=False, eos=False)
        for count in range(len(answer) + 1):
            before = b"".join(words[token] for token in answer[:count])
            rests = [data[len(before) :] for data in wanted if data.startswith(before)]
            prefixes = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)}
            expected = {token for token, word in enumerate(words) if word in prefixes} - control
            expected |= stops if b"" in rests else set()
            allowed = matcher.mask(torch.zeros(published.n_words), answer[:count], stops) == 0
            found = set(allowed.nonzero().flatten().tolist())
            # Where all texts go on alike, llguidance allows only the token that the tokenizer makes of that.
            is_forced = len(found) == 1 and all(rest.startswith(words[min(found)]) for rest in rests)
            assert found == expected or (is_forced and found <= expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_of_a_text_that_llguidance_asks_for(tmp_path: Path, family: str) -> None:
    """SentencePiece tokenizers put a space before a text, which isn't part of what follows other tokens."""
    tokenizer = HFTokenizer(save(tmp_path, FAMILIES[family].make(), FAMILIES[family].config))
    encode = Words(tokenizer)
    for text in ("the quick brown", " system", '{"é": 12}', "🙂"):
        assert b"".join(map(tokenizer.decode_bytes, encode(text))) == text.encode()
        matcher = Grammars(tokenizer).make_matcher({"type": "choice", "choice": [text, text + "!"]})
        answer: list[int] = []
        while b"".join(map(tokenizer.decode_bytes, answer)) != text.encode():
            allowed = matcher.mask(torch.zeros(tokenizer.n_words), answer, tokenizer.stop_tokens) == 0
            answer.append(int(allowed.nonzero()[0]))
            assert text.encode().startswith(b"".join(map(tokenizer.decode_bytes, answer)))
