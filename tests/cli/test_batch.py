"""`complete --input`: every line gets one record, with the answer that `Llama.complete` gives, or an error."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import batch_jobs
import pytest
from batch_jobs import MIXED, SEED, SHARED, answered, records, run
from json_lines import write

from llama import Llama
from llama.cli.batch import RequestReader, derive_seed

directory, built, llama = batch_jobs.directory, batch_jobs.built, batch_jobs.llama
pytestmark = pytest.mark.usefixtures("place")

# --- what a record says ---------------------------------------------------------------------------------------------


def test_mixed_lines_are_what_complete_makes_of_each(llama: Llama, tmp_path: Path) -> None:
    results = answered(llama, MIXED, tmp_path)
    for number, (line, record) in enumerate(zip(MIXED, results, strict=True), start=1):
        line = json.loads(json.dumps(line))
        if "prompt" in line:
            prompt = llama.tokenizer.encode(line.pop("prompt"), bos=True, eos=False)
        else:
            prompt = llama.formatter.encode_dialog_prompt(line.pop("messages"))
        own = {name: line.pop(name) for name in ("id", "meta") if name in line}
        n, logprobs = line.pop("n", 1), line.pop("logprobs", False)
        settings = {**SHARED, **line}
        if settings.get("seed") is None:
            settings["seed"] = derive_seed(SEED, number)
        if "logit_bias" in settings:
            settings["logit_bias"] = {int(k): v for k, v in settings["logit_bias"].items()}
        ones = llama.complete([prompt], n=n, logprobs=logprobs, **settings)
        every = [one.text for one in ones]
        assert record.pop("line") == number
        assert record.pop("generation") == (every if n > 1 else every[0])
        assert record.pop("finish_reason") == ([o.finish_reason for o in ones] if n > 1 else ones[0].finish_reason)
        stops = [one.stop for one in ones]
        assert record.pop("stop", None) == (None if not any(stops) else stops if n > 1 else stops[0])
        if logprobs:
            tokens = [[llama.tokenizer.decode([token]) for token in one.tokens] for one in ones]
            assert record.pop("tokens") == (tokens if n > 1 else tokens[0])
            told = record.pop("logprobs") if n > 1 else [record.pop("logprobs")]
            for a, b in zip(told, ones, strict=True):
                assert a == pytest.approx(b.logprobs, abs=1e-5)
        assert record == own


def test_answers_differ_between_lines_and_copies(llama: Llama, tmp_path: Path) -> None:
    results = answered(llama, [{"prompt": "a", "n": 3}, {"prompt": "a", "n": 3}, *[{"prompt": "a"}] * 5], tmp_path)
    texts = [*results[0]["generation"], *results[1]["generation"], *(one["generation"] for one in results[2:])]
    assert len({*texts}) == len(texts)


@pytest.mark.parametrize("shared", [{"temperature": 0}, {"temperature": 1.2, "top_p": 1.0}], ids=["greedy", "drawn"])
def test_batches_of_any_size_give_the_same_file(built: Callable[[int], Llama], tmp_path: Path, shared: dict) -> None:
    lines = [{key: x for key, x in line.items() if key != "logprobs"} for line in MIXED if "seed" not in line]
    source = write(tmp_path / "in.jsonl", [*lines, b"", b"no JSON", *lines[::-1]])
    for rows in (3, 4, 7):
        run(built(rows), source, tmp_path / f"{rows}.jsonl", **shared)
    outputs = [(tmp_path / f"{rows}.jsonl").read_bytes() for rows in (3, 4, 7)]
    assert outputs[0] == outputs[1] == outputs[2]
    numbers = [record["line"] for record in records(tmp_path / "3.jsonl")]
    assert numbers == [i + 1 for i in range(2 * len(lines) + 2) if i != len(lines)]


def test_rows_are_full_while_there_are_lines(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line begins as soon as another one has ended, and one with n answers is read once."""
    shapes: list[tuple[int, ...]] = []
    hidden_states = llama.model.hidden_states

    def watch(tokens: Any, *rest: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return hidden_states(tokens, *rest)

    monkeypatch.setattr(llama.model, "hidden_states", watch)
    lines = [{"prompt": f"{i}" * 9, "max_gen_len": 5 + 7 * (i % 3)} for i in range(9)]
    found = answered(llama, [*lines, {"prompt": "y" * 60, "n": 3}], tmp_path)
    decoded = [rows for rows, length in shapes if length == 1]
    assert decoded.count(4) > 0.5 * len(decoded)
    assert sum(rows * length for rows, length in shapes if length > 1) < 9 * 10 + 61 + 3 * 32
    assert len(found[-1]["generation"]) == 3


# --- lines that can't be answered -----------------------------------------------------------------------------------

BAD: list[tuple[Any, str]] = [
    (b"nonsense", "not JSON: Expecting value at character 1"),
    (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at character 15"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 16 of it is 0xe9"),
    (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b"[" * 100000, "not JSON that can be read"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON's"),
    (b'{"prompt": "a", "weight": 1e999}', "1e999 is too large"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    (b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", "expected a number of at least 0"),
    ([1, 2], "the line is list [1, 2], expected a JSON object"),
    ("text", "the line is str 'text'"),
    (None, "the line is NoneType None"),
    ({}, "neither prompt nor messages"),
    ({"id": 5}, "neither prompt nor messages"),
    ({"prompt": "a", "messages": []}, "both prompt and messages"),
    ({"prompt": 5}, "prompt is int 5, expected a text"),
    ({"prompt": ["a"]}, "prompt is list ['a']"),
    ({"prompt": ""}, "prompt is empty"),
    ({"messages": []}, "dialog is empty"),
    ({"messages": "hi"}, "messages is str 'hi'"),
    ({"messages": ["hi"]}, "a message is str 'hi'"),
    ({"messages": [{"role": "user"}]}, "no 'content'"),
    ({"messages": [{"role": "god", "content": "a"}]}, "unknown role 'god'"),
    ({"messages": [{"role": "user", "content": 5}]}, "'content' is int 5"),
    ({"prompt": "a", "temprature": 1}, "'temprature' is no setting: known are frequency_penalty,"),
    ({"prompt": "a", "Top-P": 1}, "'Top-P' is no setting"),
    ({"prompt": "a", "max_tokens": 1}, "'max_tokens' is no setting"),
    ({"prompt": "a", "best_of": 2}, "'best_of' is no setting"),
    ({"prompt": "a", "logits_processor": "os"}, "'logits_processor' is no setting"),
    ({"prompt": "a", "line": 5}, "'line' is a name that the record has itself"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1, expected a number of at least 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "a", "top_p": 0}, "top_p is 0"),
    ({"prompt": "a", "top_k": 0.5}, "top_k is 0.5"),
    ({"prompt": "a", "stop": [""]}, "stop is ['']"),
    ({"prompt": "a", "stop": None}, "stop is None"),
    ({"prompt": "a", "seed": "x"}, "seed is 'x'"),
    ({"prompt": "a", "max_gen_len": 0}, "max_gen_len is 0"),
    ({"prompt": "a", "logit_bias": {"e": 1}}, "logit_bias is {'e': 1}"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias is"),
    ({"prompt": "a", "logit_bias": {"512": 1}}, "logit_bias has token 512"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids is [-1]"),
    ({"prompt": "a", "n": 0}, "n is 0"),
    ({"prompt": "a", "n": True}, "n is True"),
    ({"prompt": "a", "n": "x" * 1000}, "n is 'xxx"),
    ({"prompt": "a", "logprobs": 1}, "logprobs is 1, expected true or false"),
    ({"prompt": "x" * 95}, "the text has 96 tokens, which leaves no room for an answer within 96"),
    ({"prompt": "x" * 2**20}, "the text has 1048577 tokens"),
    ({"prompt": "a", "logit_bias": {str(i): -1e30 for i in range(512)}, "min_gen_len": 9}, ""),
]


def test_every_bad_line_says_why_and_is_no_end(llama: Llama, tmp_path: Path) -> None:
    good = {"prompt": "hello"}
    lines = [x for line, _ in BAD for x in (line, good)]
    results = answered(llama, lines, tmp_path)
    assert [record["line"] for record in results] == list(range(1, len(lines) + 1))
    for (line, message), record in zip(BAD, results[::2], strict=True):
        if message:
            assert {*record} == {"line", "error"}, line
            assert message in record["error"], line
            assert len(record["error"]) < 400
    assert all(record["generation"] for record in results[1::2])


HARSH: list[dict[str, Any]] = [
    {"temperature": 1e-320},
    {"temperature": 1e300},
    {"repetition_penalty": 1e300},
    {"repetition_penalty": 1e-300},
    {"logit_bias": {"101": 1e300}},
    {"logit_bias": {"101": -1e300}},
    {"top_k": 10**30},
    {"min_gen_len": 10**30},
    {"no_repeat_ngram_size": 10**30},
    {"max_gen_len": 10**30},
    {"seed": 10**300},
    {"seed": -1},
    {"min_p": 1},
    {"top_p": 1e-300},
    {"stop": "\ud800"},
]


def test_harsh_settings_hurt_their_own_line_only(llama: Llama, tmp_path: Path) -> None:
    lines = [{"prompt": f"prompt {i}", **own} for i, own in enumerate([{}, *HARSH, {}])]
    results = answered(llama, lines, tmp_path)
    plain = answered(llama, [lines[0], *[b""] * len(HARSH), lines[-1]], tmp_path)
    assert [results[0], results[-1]] == plain
    for record in results:
        assert "generation" in record or {*record} == {"line", "error"}, record


def test_a_line_without_any_token_left_is_alone_in_its_error(llama: Llama, tmp_path: Path) -> None:
    none_left = {"prompt": "abab", "no_repeat_ngram_size": 1, "temperature": 0, "max_gen_len": None}
    none_left["logit_bias"] = {str(i): -3e38 for i in range(512)} | {"97": 0}
    results = answered(llama, [{"prompt": "one"}, none_left, {"prompt": "two"}], tmp_path)
    assert [record["line"] for record in results] == [1, 2, 3]
    assert "generation" in results[0] and "generation" in results[2]


def test_a_mark_of_byte_order_and_foreign_ends_of_lines_are_read(llama: Llama, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n \t\r\n{"prompt": "b"}')
    assert run(llama, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == f"{tmp_path}/out.jsonl: 2 lines done, 0 errors"
    assert [record["line"] for record in records(tmp_path / "out.jsonl")] == [1, 3]


def test_an_empty_input_gives_an_empty_output_without_a_model(tmp_path: Path) -> None:
    run(None, write(tmp_path / "in.jsonl", [b"", b"  "]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_reading_a_line_again_gives_the_same_job(llama: Llama) -> None:
    reader = RequestReader(llama, SHARED, SEED, datetime.now())
    for line in MIXED:
        data = json.dumps(line).encode()
        assert reader.read(3, data) == reader.read(3, data)
