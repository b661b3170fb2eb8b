"""Answers in a given form: they are what was asked for, by other programs' judgement, whatever the model prefers."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tiny import write_checkpoint

from llama import Llama
from llama.engine.grammar import write_grammar

BYTES = LLTokenizer("byte")  # another vocabulary, whose tokens are bytes
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {"enum": ["é", "東京", "🙂"]}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
WORDS = ["über", '🙂 "quoted" \\ \n', "a"]
FORMS: dict[str, tuple[dict[str, Any], str]] = {  # a format, and a regular expression for its texts
    "regex": ({"type": "regex", "regex": "[a-c]{3,9}é"}, "[a-c]{3,9}é"),
    "choice": ({"type": "choice", "choice": WORDS}, "|".join(map(re.escape, WORDS))),
    "lark": ({"type": "grammar", "grammar": 'start: "a" " " B? "c"\nB: /b{1,4}/'}, "a b{0,4}c"),
}


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def draw_schema(random: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values have a largest length."""
    kinds = ["string", "enum", "integer", "boolean", "null"] + ["object", "array", "anyOf"] * 2 * (depth > 0)
    kind = random.choice(kinds) if depth < 2 else "object"
    if kind == "string":
        return {"type": "string", "minLength": random.randrange(2), "maxLength": random.randrange(1, 5)}
    if kind == "enum":
        return {"enum": random.sample([1, -2.5, None, True, "é", "日本", 'a"\\', [1, {"a": []}]], 3)}
    if kind == "integer":
        return {"type": "integer", "minimum": random.randrange(-200, 0), "maximum": random.randrange(300)}
    if kind == "anyOf":
        return {"anyOf": [draw_schema(random, depth - 1) for _ in range(2)]}
    if kind == "array":
        return {"type": "array", "items": draw_schema(random, depth - 1), "maxItems": random.randrange(1, 4)}
    if kind == "object":
        properties = {name: draw_schema(random, depth - 1) for name in random.sample(["a", "née", "key", "b c"], 2)}
        required = random.sample([*properties], random.randrange(3))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def is_prefix(text: str, response_format: dict[str, Any]) -> bool:
    """Whether a text of the format may begin so, read as bytes."""
    data = list(text.encode())
    return LLMatcher(BYTES, write_grammar(response_format)).try_consume_tokens(data) == len(data)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    directory = write_checkpoint(tmp_path_factory.mktemp("grammar"))
    return Llama.build(directory, max_seq_len=2048, max_batch_size=8, device="cpu", dtype="float32")


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
