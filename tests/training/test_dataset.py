"""Training data: which lines are refused, with their numbers, and what is learnt of the others.

The oracle of labels counts the bytes of tokens, so that it doesn't depend on the code's own offsets.
"""

import json
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from json_lines import write
from published_tokenizers import FAMILIES, save
from records import GOOD
from vocabulary import SPECIALS, texts, unhurried

from llama import LlamaError
from llama.tasks.losses import IGNORED
from llama.tokenization.chat_template import make_formatter
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenizer import Tokenizer
from llama.training.dataset import Line, collate, find_problem_type, make_examples, name_classes, read_lines
from llama.training.preprocessing import DOC_STRIDE, Example, Preprocessor

AnyTokenizer = Tokenizer | HFTokenizer
LABELS = ("O", "B-x", "I-x", "B-y", "I-y")
SPAN = {"start": 0, "end": 1, "label": "x"}
BAD: list[tuple[str, Any, str]] = [
    ("language", b"{", "the line is not JSON: Expecting property name"),
    ("language", b'{"text": "\xff"}', "the line is not UTF-8: byte 11 of it is 0xff"),
    ("language", [1], r"the line is list \[1\], expected a JSON object"),
    ("language", {}, "found none of text, prompt and messages, expected one of them"),
    ("language", {"text": "a", "prompt": "b"}, "found text and prompt of text, prompt and messages"),
    ("language", {"text": ""}, "text is str '', expected a text of at least one character"),
    ("language", {"text": 5}, "text is int 5, expected a text"),
    ("language", {"prompt": "a"}, "no completion, expected a text"),
    ("language", {"prompt": "", "completion": "a"}, "prompt is str ''"),
    ("language", {"messages": []}, r"messages is list \[\], expected a list of messages"),
    ("language", {"messages": ["a"]}, "expected a list of messages"),
    ("language", {"messages": [{"role": "user", "content": "a"}]}, "the last message isn't the assistant's"),
    ("language", {"messages": [{"role": "assistant", "content": None}]}, "the last message isn't the assistant's"),
    ("classify", {"text": "a"}, "found neither or both of label and labels"),
    ("classify", {"text": "a", "label": "x", "labels": ["x"]}, "found neither or both of label and labels"),
    ("classify", {"label": "x"}, "no text, expected a text"),
    ("classify", {"text": "a", "label": None}, "label is None, expected a name or a number"),
    ("classify", {"text": "a", "label": ""}, "label is '', expected a name or a number"),
    ("classify", {"text": "a", "label": True}, "label is True, expected a name or a number"),
    ("classify", b'{"text": "a", "label": NaN}', "NaN is no number of JSON's"),
    ("classify", b'{"text": "a", "label": 1e999}', "1e999 is too large"),
    ("classify", {"text": "a", "labels": "x"}, "labels is 'x', expected a list of names"),
    ("classify", {"text": "a", "labels": ["x", 1]}, r"labels is \['x', 1\], expected a list of names"),
    ("tag", {"text": "a"}, "spans is NoneType None, expected a list"),
    ("tag", {"text": "a", "spans": ["x"]}, "a span is 'x', expected start, end and label"),
    ("tag", {"text": "a", "spans": [{**SPAN, "label": 5}]}, "expected start, end and label"),
    ("tag", {"text": "a", "spans": [{**SPAN, "start": -1}]}, "expected start, end and label"),
    ("tag", {"text": "a", "spans": [{**SPAN, "end": 1.0}]}, "expected start, end and label"),
    ("tag", {"text": "a", "spans": [{**SPAN, "start": False}]}, "expected start, end and label"),
    ("tag", {"text": "é", "spans": [{**SPAN, "end": 2}]}, "a span is from 0 to 2 of a text of 1 characters"),
    ("tag", {"text": "a", "spans": [{**SPAN, "end": 0}]}, "a span is from 0 to 0 of a text"),
    ("tag", {"text": "abc", "spans": [{**SPAN, "start": 1, "end": 3}, {**SPAN, "end": 2}]}, "at 0 and 1 overlap"),
    ("tag", {"text": "abc", "spans": [SPAN, SPAN]}, "the spans at 0 and 0 overlap"),
    ("answer", {"question": "a", "answers": []}, "no context, expected a text"),
    ("answer", {"question": "", "context": "a", "answers": []}, "question is str ''"),
    ("answer", {"question": "a", "context": "a"}, "answers is NoneType None, expected a list, empty where"),
    ("answer", {"question": "a", "context": "a", "answers": ["a"]}, "an answer is 'a', expected text and start"),
    ("answer", {"question": "a", "context": "a", "answers": [{"text": "", "start": 0}]}, "expected text and start"),
    ("answer", {"question": "a", "context": "a", "answers": [{"text": "a"}]}, "expected text and start"),
    ("answer", {"question": "a", "context": "ab", "answers": [{"text": "a", "start": 1}]}, "doesn't say 'a' at char"),
    ("answer", {"question": "a", "context": "ab", "answers": [{"text": "a", "start": 9}]}, "doesn't say 'a' at char"),
]

# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GOOD)
def test_all_lines_are_read_and_empty_ones_passed_over(task: Any, tmp_path: Path) -> None:
    lines = [b"", b"\xef\xbb\xbf" + json.dumps(GOOD[task][0]).encode(), b"  \r", *GOOD[task][1:]]
    actual = read_lines(write(tmp_path / "in.jsonl", lines), task)
    numbers = [2, *range(4, len(GOOD[task]) + 3)]
    assert actual == [Line(number, given) for number, given in zip(numbers, GOOD[task], strict=True)]


@pytest.mark.parametrize(("task", "line", "message"), BAD)
def test_a_spoiled_line_is_named(task: Any, line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [*GOOD[task], b"", line, *GOOD[task]])
    with pytest.raises(LlamaError, match=rf"in\.jsonl: line {len(GOOD[task]) + 2}: .*{message}") as caught:
        read_lines(path, task)
    assert "\n" not in str(caught.value)


def test_many_spoiled_lines_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"text": i} for i in range(9)])
    with pytest.raises(LlamaError, match=r"line 1: .*; line 5: text is int 4, .*; and 4 more lines$"):
        read_lines(path, "language")
    path = write(tmp_path / "in.jsonl", [{"text": i} for i in range(6)])
    with pytest.raises(LlamaError, match=r"; and 1 more line$"):
        read_lines(path, "language")


def test_files_without_lines(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match=r"empty.jsonl has no lines: expected at least one to tag"):
        read_lines(write(tmp_path / "empty.jsonl", [b"", b" "]), "tag")
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(LlamaError, match="can't be read"):
            read_lines(path, "tag")


def records(*given: dict[str, Any]) -> list[Line]:
    return [Line(number, one) for number, one in enumerate(given, start=1)]


def test_labels_and_problems() -> None:
    single = records({"text": "a", "label": "é"}, {"text": "a", "label": "b"}, {"text": "a", "label": "é"})
    several = records({"text": "a", "labels": []}, {"text": "a", "labels": ["z", "y"]})
    numbers = records({"text": "a", "label": 1}, {"text": "a", "label": -0.5})
    for lines, problem, labels in (
        (single, "single_label_classification", ["b", "é"]),
        (several, "multi_label_classification", ["y", "z"]),
        (numbers, "regression", ["value"]),
    ):
        assert find_problem_type(lines, "classify", "f") == problem
        assert name_classes(lines, "classify") == labels
    with pytest.raises(LlamaError, match="f: line 1 is regression and line 2 single_label_classification"):
        find_problem_type(records({"text": "a", "label": 1}, {"text": "a", "label": "1"}), "classify", "f")
    assert name_classes(records(*GOOD["tag"]), "tag") == [*LABELS]
    assert name_classes(records({"text": "a", "spans": []}), "tag") == ["O"]
    assert name_classes(records(*GOOD["answer"]), "answer") is None


# --- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiktoken", "llama3", "llama2", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "tiktoken":
        return small
    family = FAMILIES[request.param]
    template = family.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    config = {**family.config, "chat_template": template}
    return HFTokenizer(save(tmp_path_factory.mktemp("records"), family.make(), config))


def preprocessor(tokenizer: AnyTokenizer, max_seq_len: int, labels: tuple[str, ...] = LABELS) -> Preprocessor:
    classes = {label: i for i, label in enumerate(labels)}
    return Preprocessor(tokenizer, make_formatter(tokenizer, datetime(2001, 2, 3)), classes, max_seq_len)


def learnt(example: Example) -> list[int]:
    return [label for label in example.target if label != IGNORED]


def check_language(example: Example, max_seq_len: int) -> None:
    """A label is the token itself or IGNORED, and the first is IGNORED, since nothing comes before it."""
    assert len(example.tokens) == len(example.target) <= max_seq_len and example.target[0] == IGNORED
    assert all(label in (token, IGNORED) for token, label in zip(example.tokens, example.target, strict=True))
    assert example.items == len(learnt(example)) > 0


@unhurried
@given(text=texts.filter(bool), size=st.integers(2, 12))
def test_all_of_a_text_is_learnt(tokenizer: AnyTokenizer, text: str, size: int) -> None:
    rows = make_examples(preprocessor(tokenizer, size), "language", records({"text": text}), "f")
    whole = tokenizer.encode(text, bos=True, eos=True)
    for row in rows:
        check_language(row, size)
        assert learnt(row) == row.tokens[1:]
    tail = whole[-1:] if len(whole) % size == 1 else []  # a row of its own, of which nothing can be learnt
    assert [token for row in rows for token in row.tokens] + tail == whole


@unhurried
@given(prompt=texts.filter(bool), completion=texts.filter(bool))
def test_a_completion_alone_is_learnt(tokenizer: AnyTokenizer, prompt: str, completion: str) -> None:
    given = {"prompt": prompt, "completion": completion}
    (row,) = make_examples(preprocessor(tokenizer, 10_000), "language", records(given), "f")
    check_language(row, 10_000)
    before = tokenizer.encode(prompt, bos=True, eos=False)
    assert row.tokens[: len(before)] == before and set(row.target[: len(before)]) == {IGNORED}
    *answer, last = learnt(row)
    assert last == tokenizer.eos_id
    assert answer == tokenizer.encode(completion, bos=False, eos=False) == row.tokens[len(before) : -1]


@unhurried
@given(asked=texts.filter(str.strip), answer=texts)
def test_the_answers_of_a_dialog_are_learnt(tokenizer: AnyTokenizer, asked: str, answer: str) -> None:
    before = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "the earlier one"},
        {"role": "user", "content": asked},
    ]
    made = preprocessor(tokenizer, 10_000)
    dialog = {"messages": [*before, {"role": "assistant", "content": answer}]}
    (row,) = make_examples(made, "language", records(dialog), "f")
    check_language(row, 10_000)
    prompt = made.formatter.encode_dialog_prompt(before)  # type: ignore[arg-type]
    assert row.tokens[: len(prompt)] == prompt
    whole = made.formatter.encode_dialog_prompt(dialog["messages"], add_generation_prompt=False)  # type: ignore[arg-type]
    assert row.tokens == whole
    answers = learnt(row)
    ends = [i for i, token in enumerate(answers) if token in tokenizer.stop_tokens]
    assert len(ends) == 2 and ends[1] == len(answers) - 1
    for said, start, end in (("the earlier one", 0, ends[0]), (answer, ends[0] + 1, ends[1])):
        plain = tokenizer.decode(tokenizer.encode(said, bos=False, eos=False)).strip()
        assert tokenizer.decode(answers[start:end]).strip() in (plain, said.strip())


def test_what_is_no_dialog_is_named_by_its_line(small: Tokenizer) -> None:
    user, last = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
    good, alone = {"messages": [user, last]}, {"messages": [last]}
    strange = {"messages": [{"role": "god", "content": "a"}, last]}
    with pytest.raises(LlamaError, match=r"f: line 2: the dialog is empty.*; line 3: .*unknown role 'god'"):
        make_examples(preprocessor(small, 99), "language", records(good, alone, strange), "f")


def bytes_of(tokenizer: AnyTokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """The range of bytes, [start, end), of each token in the whole text."""
    ends = list(accumulate(len(tokenizer.decode_bytes(token)) for token in ids))
    return list(pairwise([0, *ends]))


@st.composite
def spanned(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    text = draw(st.one_of(texts, st.text("the in é😀中\n", max_size=60)).filter(bool))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    actual = [{"start": a, "end": b, "label": draw(st.sampled_from("xy"))} for a, b in pairwise(cuts)]
    return text, draw(st.permutations([one for one in actual if draw(st.booleans())]))


@unhurried
@given(made=spanned(), size=st.integers(2, 12))
@example(made=("the the", [{"start": 2, "end": 5, "label": "x"}, {"start": 0, "end": 2, "label": "y"}]), size=9)
@example(made=("a😀b", [{"start": 1, "end": 2, "label": "x"}]), size=3)
def test_tagged_tokens_are_those_of_the_spans(small: Tokenizer, made: tuple[str, list[dict]], size: int) -> None:
    """A token with a byte of a span belongs to the span; if two spans share a token, to the later one in the record."""
    text, spans = made
    rows = make_examples(preprocessor(small, size), "tag", records({"text": text, "spans": spans}), "f")
    ids = small.encode(text, bos=False, eos=False)
    assert [token for row in rows for token in row.tokens[1:]] == ids
    expected = ["O"] * len(ids)
    for span in spans:
        first, last = (len(text[: span[name]].encode()) for name in ("start", "end"))
        own = [i for i, (start, end) in enumerate(bytes_of(small, ids)) if start < last and end > first]
        expected[own[0]] = f"B-{span['label']}"
        for i in own[1:]:
            expected[i] = f"I-{span['label']}"
    assert [LABELS[label] for row in rows for label in row.target[1:]] == expected
    for row in rows:
        assert row.tokens[0] == small.bos_id and row.target[0] == IGNORED and len(row.tokens) <= size
        assert row.items == len(row.tokens) - 1


def test_tags_in_normalized_text(tokenizer: AnyTokenizer) -> None:
    """With any tokenizer, the tagged tokens decode to the text of the span."""
    text = "We went to Sao Tome then to the inn"
    spans = [{"start": 11, "end": 19, "label": "x"}, {"start": 28, "end": 35, "label": "y"}]
    (row,) = make_examples(preprocessor(tokenizer, 99), "tag", records({"text": text, "spans": spans}), "f")
    for kind, said in (("x", "Sao Tome"), ("y", "the inn")):
        own = [i for i, label in enumerate(row.target) if label != IGNORED and LABELS[label][2:] == kind]
        assert own == [*range(own[0], own[-1] + 1)] and LABELS[row.target[own[0]]][0] == "B"
        assert tokenizer.decode([row.tokens[i] for i in own]).strip() == said


def test_a_label_that_the_head_has_not(small: Tokenizer) -> None:
    given = {"text": "a", "spans": [{"start": 0, "end": 1, "label": "z"}]}
    with pytest.raises(LlamaError, match="f: line 1: 'B-z' is no label of the head: known are O, B-x"):
        make_examples(preprocessor(small, 9), "tag", records(given), "f")


@unhurried
@given(
    context=st.one_of(texts, st.text("the in é😀中", min_size=100, max_size=500)).filter(str.strip),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.integers(DOC_STRIDE + 20, 400),
)
def test_answers_are_found_in_windows(small: Tokenizer, context: str, ends: tuple[float, float], size: int) -> None:
    start, end = sorted(round(share * len(context)) for share in ends)
    assume(start < end)
    answers = [{"text": context[start:end], "start": start}, {"text": context[:1], "start": 0}]
    given = {"question": "who", "context": context, "answers": answers}
    rows = make_examples(preprocessor(small, size), "answer", records(given), "f")
    question = [small.bos_id, *small.encode("who", bos=False, eos=False), small.bos_id]
    ids = small.encode(context, bos=False, eos=False)
    first, last = len(context[:start].encode()), len(context[:end].encode())
    own = [i for i, (a, b) in enumerate(bytes_of(small, ids)) if a < last and b > first]
    begun, done, whole = 0, 0, 0  # where a window begins, how far the last one went
    for row in rows:
        window = row.tokens[len(question) :]
        assert row.tokens[: len(question)] == question and len(row.tokens) <= size and row.items == 1
        assert window == ids[begun : begun + len(window)]
        has_all = begun <= own[0] and own[-1] < begun + len(window)
        place = len(question) - begun
        assert row.target == ((own[0] + place, own[-1] + place) if has_all else (0, 0))
        if has_all:
            said = small.decode_bytes if len(own) == 1 else None
            text = (
                said(row.tokens[row.target[0]])
                if said
                else b"".join(small.decode_bytes(token) for token in row.tokens[row.target[0] : row.target[1] + 1])
            )
            assert context[start:end].encode() in text
        whole += has_all
        done = begun + len(window)
        begun = done - DOC_STRIDE
    assert done == len(ids), "all of the context is read"
    assert whole or len(own) > DOC_STRIDE, "what is shorter than windows have in common is whole in one of them"


def test_no_answer_is_at_position_0(tokenizer: AnyTokenizer) -> None:
    given = {"question": "who?", "context": "It doesn't say. " * 30, "answers": []}
    rows = make_examples(preprocessor(tokenizer, 200), "answer", records(given), "f")
    assert len(rows) > 1 and {row.target for row in rows} == {(0, 0)}


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({"label": "B-x"}, 1),
        ({"labels": []}, (0.0, 0.0, 0.0, 0.0, 0.0)),
        ({"labels": ["I-y", "O", "O"]}, (1.0, 0.0, 0.0, 0.0, 1.0)),
        ({"label": -2}, (-2.0,)),
        ({"label": 0.5}, (0.5,)),
    ],
)
def test_classes(tokenizer: AnyTokenizer, given: dict[str, Any], target: Any) -> None:
    (row,) = make_examples(preprocessor(tokenizer, 99), "classify", records({"text": "ab c", **given}), "f")
    assert row.tokens == tokenizer.encode("ab c", bos=True, eos=False)
    assert (row.target, type(row.target), row.items) == (target, type(target), 1)


@pytest.mark.parametrize(
    ("task", "given", "size"),
    [
        ("classify", {"text": "x" * 8, "label": "O"}, 8),
        ("language", {"prompt": "x" * 4, "completion": "xxx"}, 8),
        ("answer", {"question": "x" * 9, "context": "a", "answers": []}, 8),
        ("answer", {"question": "x", "context": "a" * 9, "answers": []}, 8),
    ],
)
def test_what_does_not_fit_is_named_by_its_line(small: Tokenizer, task: Any, given: dict, size: int) -> None:
    with pytest.raises(LlamaError, match=r"f: line 2: .*max_seq_len"):
        make_examples(
            preprocessor(small, size), task, records(GOOD[task][-1] if task == "answer" else given, given)[1:], "f"
        )
    assert make_examples(preprocessor(small, 300), task, records(given), "f")


@pytest.mark.parametrize("task", ["language", "tag"])
def test_nothing_to_be_learnt_is_refused(small: Tokenizer, task: Any) -> None:
    with pytest.raises(LlamaError, match=r"f: .*max_seq_len"):
        make_examples(preprocessor(small, 1), task, records({"text": "a", "spans": []}), "f")


def test_a_batch_is_padded_on_the_right() -> None:
    batch = [Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [IGNORED])]
    actual = collate(batch, "language", torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in actual.items()} == {
        "tokens": [[5, 6, 7], [8, 0, 0]],
        "lengths": [3, 1],
        "labels": [[IGNORED, 6, 7], [IGNORED] * 3],
    }
    actual = collate([Example([5], (0, 0)), Example([5, 6], (0, 1))], "answer", torch.device("cpu"))
    assert (actual["start_positions"].tolist(), actual["end_positions"].tolist()) == ([0, 0], [0, 1])
    numbers = collate([Example([5], (0.5,)), Example([5], (-1.0,))], "classify", torch.device("cpu"))["labels"]
    assert numbers.tolist() == [[0.5], [-1.0]] and numbers.is_floating_point()
    assert not collate([Example([5], 2)], "classify", torch.device("cpu"))["labels"].is_floating_point()


def test_control_tokens_in_a_text_are_text(small: Tokenizer) -> None:
    (row,) = make_examples(preprocessor(small, 99), "language", records({"text": "<|eot_id|>"}), "f")
    assert small.special_tokens["<|eot_id|>"] not in row.tokens and "<|eot_id|>" in SPECIALS
