"""`complete --input`: every line gets one record, with the answer that `Llama.complete` gives, whatever happens.

On a tiny random model in float32, whose vocabulary is the bytes.
"""

import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal
from tiny import ARGS, ROOT, environment, launched, run_program, write_checkpoint

from llama import Llama, LlamaError
from llama.cli.batch import RequestReader, complete_file, derive_seed
from llama.cli.resumable_output import ResumableRecords

pytestmark = pytest.mark.usefixtures("place")
SHARED: dict[str, Any] = {"temperature": 0.9, "max_gen_len": 12}
SEED = 7
MIXED = [
    {"prompt": "hello there", "id": "first"},
    {"prompt": "a", "temperature": 0, "meta": {"é": [1, None, "\ud800"]}},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "max_gen_len": 5},
    {"prompt": "the quick brown fox", "n": 3, "temperature": 1.5},
    {"prompt": "é漢字🙂", "logprobs": True, "seed": 5, "top_k": 3},
    {"prompt": "n and logprobs", "n": 2, "logprobs": True, "seed": 3, "stop": ["e"], "temperature": 2},
    {"prompt": "x" * 40, "logit_bias": {"101": 100}, "stop": "eee"},
    {"prompt": "again", "stop_token_ids": [97, 98], "repetition_penalty": 1.3, "max_gen_len": None},
    {"prompt": "again", "seed": None, "min_p": 0.1, "top_p": 0.5},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("jobs") / "ckpt", ARGS, endless=True)


@pytest.fixture(scope="module")
def built(directory: Path) -> Callable[[int], Llama]:
    made: dict[int, Llama] = {}

    def build(rows: int) -> Llama:
        if rows not in made:
            made[rows] = Llama.build(directory, max_seq_len=96, max_batch_size=rows, device="cpu", dtype="float32")
        return made[rows]

    return build


@pytest.fixture
def llama(built: Callable[[int], Llama]) -> Llama:
    return built(4)


def write(path: Path, lines: list[Any]) -> Path:
    """Write lines: bytes as they are, other values as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def run(llama: Llama | None, source: Path, output: Path, force: bool = False, **shared: Any) -> str | None:
    """llama: None if no model may be built."""

    def build() -> Llama:
        assert llama is not None, "a model was built"
        return llama

    about = {"max_seq_len": 96}
    return complete_file(str(source), str(output), {**SHARED, **shared}, SEED, about, force, build)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def answered(llama: Llama, lines: list[Any], tmp_path: Path) -> list[dict]:
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    run(llama, write(tmp_path / "in.jsonl", lines), output)
    return records(output)


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


def test_batches_are_full_and_of_like_length(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = heard(llama, monkeypatch)
    sizes = [5, 50, 7, 45, 6, 47, 8, 46, 9]
    answered(llama, [{"prompt": "x" * size} for size in sizes] + [{"prompt": "y" * 60, "n": 2}] * 3, tmp_path)
    lengths = [[len(prompt) - 1 for prompt in prompts] for prompts in batches]  # less begin_of_text
    assert lengths == [[50, 47, 46, 45], [9, 8, 7, 6], [5], [60, 60], [60]]


def heard(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The prompts of each call of `llama.complete` from here on."""
    batches: list[list[list[int]]] = []
    complete = llama.complete

    def listening(prompts: list[list[int]], **options: Any) -> Any:
        batches.append(prompts)
        return complete(prompts, **options)

    monkeypatch.setattr(llama, "complete", listening)
    return batches


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
    ({"prompt": "a", "n": 5}, "n is 5, but max_batch_size is 4: raise --max_batch_size"),
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


# --- interruption ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def whole(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes, bytes]:
    """(input file, content of its output, content of its part file just before the end)"""
    source = write(tmp_path / "in.jsonl", [*MIXED, b"no JSON", *MIXED[:3]])
    output = tmp_path / "whole.jsonl"
    run(llama, source, output)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("llama.cli.resumable_output.os.replace", killed)
        run(llama, source, tmp_path / "cut.jsonl")
    part = tmp_path / "cut.jsonl.part"
    return source, output.read_bytes(), part.read_bytes()


def test_a_part_cut_anywhere_is_gone_on_with(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, bytes, bytes]
) -> None:
    source, expected, part = whole
    ends = [i + 2 for i in range(len(part)) if part[i : i + 2] == b"\n\n"]  # of batches
    start = part.index(b"\n") + 1
    cuts = {0, 1, start - 1, start, start + 1, len(part), len(part) - 1, *range(0, len(part), 997)}
    cuts |= {end + d for end in ends for d in (-1, 0)}
    batches = heard(llama, monkeypatch)
    for cut in sorted(cut for cut in cuts if cut <= len(part)):
        (tmp_path / "cut.jsonl.part").write_bytes(part[:cut])
        (tmp_path / "cut.jsonl").unlink(missing_ok=True)
        batches.clear()
        run(llama, source, tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == expected, cut
        whole_ones = [b for b in part[start:cut].split(b"\n\n")[:-1] if b'"error"' not in b] if cut >= start else []
        done = sum(b.count(b"\n") + 1 for b in whole_ones)
        assert sum(map(len, batches)) == len(MIXED) + 3 - done, "each line that lacks a record, once"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "in.jsonl", "whole.jsonl"]


def test_what_goes_on_on_another_day_takes_the_first_for_today(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, bytes, bytes]
) -> None:
    """Chat templates may write the date, and the prompts must stay the same."""
    head = json.loads(whole[2].splitlines()[0])
    head["fixed"]["today"] = "2001-02-03T04:05:06"
    (tmp_path / "cut.jsonl.part").write_bytes(json.dumps(head).encode() + b"\n")
    days: list[datetime] = []

    def reading(*given: Any) -> RequestReader:
        days.append(given[-1])
        return RequestReader(*given)

    monkeypatch.setattr("llama.cli.batch.RequestReader", reading)
    run(llama, whole[0], tmp_path / "cut.jsonl")
    assert days == [datetime(2001, 2, 3, 4, 5, 6)]
    assert (tmp_path / "cut.jsonl").read_bytes() == whole[1]


@pytest.mark.parametrize("where", ["os.replace", "Path.unlink"])
def test_a_kill_at_the_very_end_needs_no_model_any_more(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(f"llama.cli.resumable_output.{where}", killed)
        run(llama, source, output)
    assert (tmp_path / "out.jsonl.part").exists()
    assert output.exists() == (where == "Path.unlink")
    run(None, source, output)
    assert [record["line"] for record in records(output)] == list(range(1, len(MIXED) + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def command(directory: Path, source: Path, output: Path, *more: str) -> list[str]:
    where = ["--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32", "--max_seq_len", "96"]
    settings = ["--temperature", "0.9", "--max_gen_len", "60", "--seed", str(SEED)]
    return ["-m", "llama", "complete", "--input", str(source), "--output", str(output), *where, *settings, *more]


@pytest.fixture(scope="module")
def long_job(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(input file of many batches, content of the output that one process writes)"""
    folder = tmp_path_factory.mktemp("long")
    lines: list[Any] = [{"prompt": f"{'abc ' * (i % 7)}prompt {i}", "id": i} for i in range(60)]
    source = write(folder / "in.jsonl", [*lines, b"no JSON", {**lines[0], "n": 2, "logprobs": True}])
    done = run_program(*command(directory, source, folder / "out.jsonl"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == f"{folder}/out.jsonl: 62 lines done, 1 error\n", "and no bar where nobody looks"
    return source, (folder / "out.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same(
    directory: Path, long_job: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, expected = long_job
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    seen = 0
    for more in (0, 1, 3, 5):  # batches that are there when it is killed
        process = subprocess.Popen(
            launched(*command(directory, source, output)), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 60
        while not part.exists() or part.read_bytes().count(b"\n\n") < seen + more:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
        seen = part.read_bytes().count(b"\n\n")
    assert 8 < seen < 17, "it was killed before the end"
    done = run_program(*command(directory, source, output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected
    assert "62 lines done, 1 error, " in done.stderr and "by earlier runs" in done.stderr


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_input_or_setting_is_refused_unless_forced(
    llama: Llama, tmp_path: Path, whole: tuple[Path, bytes, bytes]
) -> None:
    source, expected, part = whole
    output = tmp_path / "cut.jsonl"
    with pytest.raises(LlamaError, match=r"part was begun with another temperature \(0.9, now 0.5\).*--force"):
        run(None, source, output, temperature=0.5)
    other = write(tmp_path / "other.jsonl", [{"prompt": "b"}])
    with pytest.raises(LlamaError, match=r"begun with another input .*--force to begin anew"):
        run(None, other, output)
    assert (tmp_path / "cut.jsonl.part").read_bytes() == part, "nothing was lost"
    run(llama, other, output, force=True)
    assert len(records(output)) == 1
    with pytest.raises(LlamaError, match=r"cut.jsonl is complete already: .*--force to begin anew"):
        run(None, source, output)
    assert len(records(output)) == 1
    run(llama, source, output, force=True)
    assert output.read_bytes() == expected


@pytest.mark.parametrize("content", [b"my notes\n", b'{"a": 1}\n', b"[]\n", b'{"about": {}}\n', b"[" * 99999 + b"\n"])
def test_a_file_that_is_no_part_is_left_alone(tmp_path: Path, content: bytes) -> None:
    source, part = write(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl.part"
    part.write_bytes(content)
    with pytest.raises(LlamaError, match=r"out.jsonl.part .*--force"):
        run(None, source, tmp_path / "out.jsonl")
    assert part.read_bytes() == content


def test_a_damaged_record_is_refused(tmp_path: Path, whole: tuple[Path, bytes, bytes]) -> None:
    source, _, part = whole
    (tmp_path / "cut.jsonl.part").write_bytes(part.replace(b'{"line": 1, ', b'{"line": 1; '))
    with pytest.raises(LlamaError, match="is damaged"):
        run(None, source, tmp_path / "cut.jsonl")


def test_two_processes_do_not_write_one_file(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl"
    complete, refused = llama.complete, []

    def second(*given: Any, **options: Any) -> Any:
        for force in (False, True):
            with pytest.raises(LlamaError, match="is being written by another process"):
                run(None, source, output, force=force)
        refused.append(True)
        return complete(*given, **options)

    monkeypatch.setattr(llama, "complete", second)
    run(llama, source, output)
    assert refused and len(records(output)) == len(MIXED)


def test_names_of_files_that_can_not_be(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", MIXED)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "in.jsonl.part").symlink_to(source)
    for given, output, message in [
        (tmp_path / "none", "out", "none can't be read"),
        (tmp_path, "out", "is no file: expected one of JSON lines"),
        (source, "nowhere/out", "can't be written"),
        (source, "", "is no file"),
        (source, "in.jsonl", "would write over the input"),
        (source, "link", "would write over the input"),
        (tmp_path / "in.jsonl.part", "in.jsonl", "would write over the input"),
    ]:
        before = source.read_bytes()
        with pytest.raises(LlamaError, match=message):
            run(None, given, tmp_path / output, force=True)
        assert source.read_bytes() == before
    with pytest.raises(LlamaError, match="is no file"):
        run(None, source, Path("/dev/null"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a text or --input: there are neither"),
        (["a text", "--input", "x"], "give either a text or --input: there are both"),
        (["a text", "--output", "x"], "--output belongs to --input"),
        (["a text", "--max_batch_size", "2"], "--max_batch_size belongs to --input"),
        (["--output", "x"], "give either a text or --input: there are neither"),
        (["--input", "x"], "--input needs --output"),
        (["--input", "/nowhere/in", "--output", "/tmp/out"], "/nowhere/in can't be read"),
        (["--input", "LICENSE", "--output", "/nowhere/out"], "/nowhere/out.part can't be written"),
        (["--input", "LICENSE", "--output", "x", "--top_k", "0"], "top_k is 0"),
        (["--input", "LICENSE", "--output", "x", "--max_batch_size", "0"], "max_batch_size is 0"),
        (["a text", "--min_p", "2"], "min_p is 2.0"),
    ],
)
@pytest.mark.slow
def test_mistakes_of_the_command_get_one_line(options: list[str], message: str) -> None:
    done = run_program("-m", "llama", "complete", *options, "--ckpt_dir", "/never/looked/at")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {message}"), done.stderr


def test_settings_of_the_command_line_hold_for_a_text_too(directory: Path, llama: Llama) -> None:
    where = ["--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32", "--max_seq_len", "96"]
    more = ["--top_k", "1", "--repetition_penalty", "1.5", "--stop", "zz", "--stop", "qq", "--max_gen_len", "20"]
    done = run_program("-m", "llama", "complete", "hello", *where, *more)
    (one,) = llama.text_completion(["hello"], top_k=1, repetition_penalty=1.5, stop=["zz", "qq"], max_gen_len=20)
    assert done.stdout == one["generation"] + "\n", done.stderr


# --- ranks, and people ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_write_what_one_does(directory: Path, long_job: tuple[Path, bytes], tmp_path: Path) -> None:
    """On a third of the lines, which get the same records as in the whole file, since seeds depend on line numbers."""
    source = tmp_path / "in.jsonl"
    kept = [line if i % 3 == 1 else b"\n" for i, line in enumerate(long_job[0].read_bytes().splitlines(keepends=True))]
    source.write_bytes(b"".join(kept))
    done = run_program(*command(directory, source, tmp_path / "out.jsonl"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"{tmp_path}/out.jsonl: 21 lines done, 0 errors"
    (tmp_path / "expected").write_bytes(long_job[1])
    expected = [record for record in records(tmp_path / "expected") if record["line"] % 3 == 2]
    for a, b in zip(records(tmp_path / "out.jsonl"), expected, strict=True):
        assert a.pop("logprobs", [[]])[0] == pytest.approx(b.pop("logprobs", [[]])[0], abs=1e-4)
        assert a == b


@pytest.mark.parametrize("wrong", ["input", "output"])
@pytest.mark.slow
def test_on_ranks_a_mistake_is_said_once(directory: Path, long_job: tuple[Path, bytes], wrong: str) -> None:
    source = Path("/nowhere/in") if wrong == "input" else long_job[0]
    done = run_program(*command(directory, source, Path("/nowhere/out")), ranks=2)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "/nowhere/" in errors[0]


@pytest.mark.slow
def test_a_terminal_gets_a_bar(directory: Path, long_job: tuple[Path, bytes], tmp_path: Path) -> None:
    terminal = Terminal(*command(directory, long_job[0], tmp_path / "out.jsonl"))
    termios.tcsetwinsize(terminal.master, (24, 120))
    try:
        terminal.wait_for(r"completing: +\d+%.*/62 .*[1-9]\d* tokens/s")
        terminal.wait_for(r"62 lines done, 1 error")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


def test_a_full_disk_ends_in_one_line_and_loses_nothing(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl"
    run(llama, source, tmp_path / "whole.jsonl")
    append, calls = ResumableRecords._append, []

    def full(self: ResumableRecords, data: bytes) -> None:
        calls.append(data)
        if len(calls) == 3:
            append(self, data[:20])
            raise OSError(28, os.strerror(28))
        append(self, data)

    with monkeypatch.context() as patched, pytest.raises(LlamaError, match="No space left on device"):
        patched.setattr(ResumableRecords, "_append", full)
        run(llama, source, output)
    run(llama, source, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
