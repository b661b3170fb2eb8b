"""`complete --input`: a job that was interrupted goes on to the same file, and what can't be written is refused."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import batch_jobs
import pytest
from batch_jobs import MIXED, assert_same_records, heard, records, run
from json_lines import write

from llama import Llama, LlamaError
from llama.cli.batch import RequestReader
from llama.cli.resumable_output import ResumableRecords

directory, built, llama = batch_jobs.directory, batch_jobs.built, batch_jobs.llama
pytestmark = pytest.mark.usefixtures("place")

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
        assert_same_records(tmp_path / "cut.jsonl", expected)
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
    assert_same_records(tmp_path / "cut.jsonl", whole[1])


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


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_input_or_setting_is_refused_unless_forced(
    llama: Llama, tmp_path: Path, whole: tuple[Path, bytes, bytes]
) -> None:
    source, expected, part = whole
    output = tmp_path / "cut.jsonl"
    with pytest.raises(LlamaError, match=r"part was begun with another temperature \(0.9, now 0.5\).*--force"):
        run(None, source, output, temperature=0.5)
    other = write(tmp_path / "other.jsonl", [{"prompt": "b"}])
    with pytest.raises(LlamaError, match=r"begun with another input .*begin anew with --force"):
        run(None, other, output)
    assert (tmp_path / "cut.jsonl.part").read_bytes() == part, "nothing was lost"
    run(llama, other, output, force=True)
    assert len(records(output)) == 1
    with pytest.raises(LlamaError, match=r"cut.jsonl is complete already: .*begin anew with --force"):
        run(None, source, output)
    assert len(records(output)) == 1
    run(llama, source, output, force=True)
    assert_same_records(output, expected)


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
    make_requests, refused = llama.engine.make_requests, []

    def second(*given: Any, **options: Any) -> Any:
        for force in (False, True):
            with pytest.raises(LlamaError, match="is being written by another process"):
                run(None, source, output, force=force)
        refused.append(True)
        return make_requests(*given, **options)

    monkeypatch.setattr(llama.engine, "make_requests", second)
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


# --- a full disk ----------------------------------------------------------------------------------------------------


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
    assert_same_records(output, (tmp_path / "whole.jsonl").read_bytes())
