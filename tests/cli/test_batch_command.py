"""`python -m llama complete --input` as a program: killed, on ranks, in a terminal, with wrong options."""

import signal
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import batch_jobs
import pytest
from batch_jobs import SEED, assert_same_records, records
from json_lines import write
from terminal import Terminal
from tiny import ROOT, environment, launched, run_program

from llama import Llama

directory, built, llama = batch_jobs.directory, batch_jobs.built, batch_jobs.llama
pytestmark = pytest.mark.usefixtures("place")

# --- killed ---------------------------------------------------------------------------------------------------------


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
    assert 8 < seen < 60, "it was killed before the end"
    done = run_program(*command(directory, source, output))
    assert done.returncode == 0, done.stderr
    assert_same_records(output, expected)
    assert "62 lines done, 1 error, " in done.stderr and "by earlier runs" in done.stderr


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a text or --input: there are neither"),
        (["a text", "--input", "x"], "give either a text or --input: there are both"),
        (["a text", "--output", "x"], "--output belongs to --input"),
        (["a text", "--max_batch_size", "2"], "--max_batch_size belongs to --input"),
        (["--output", "x"], "give either a text or --input: there are neither"),
        (["--input", "x"], "--input needs --output"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "/nowhere/in", "--output", "/tmp/out"], "/nowhere/in can't be read"),
        (["--input", "LICENSE", "--output", "/nowhere/out"], "/nowhere/out.part can't be written"),
    ],
)
@pytest.mark.slow
def test_files_that_are_not_there_are_told_before_a_model_is_loaded(
    directory: Path, options: list[str], message: str, tmp_path: Path
) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(b"" if path.suffix == ".pth" else path.read_bytes())  # nothing to load
    done = run_program("-m", "llama", "complete", *options, "--ckpt_dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {message}"), done.stderr


def test_settings_of_the_command_line_hold_for_a_text_too(directory: Path, llama: Llama) -> None:
    where = ["--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32", "--max_seq_len", "96"]
    more = ["--top_k", "1", "--repetition_penalty", "1.5", "--stop", "zz", "--stop", "qq", "--max_gen_len", "20"]
    done = run_program("-m", "llama", "complete", "hello", *where, *more)
    (one,) = llama.text_completion(["hello"], top_k=1, repetition_penalty=1.5, stop=["zz", "qq"], max_gen_len=20)
    assert done.stdout == one["generation"] + "\n", done.stderr


# --- ranks, and people ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "share"), [(2, 2), (2, 1), (4, 2)])
@pytest.mark.slow
def test_ranks_write_what_one_does(
    directory: Path, long_job: tuple[Path, bytes], tmp_path: Path, ranks: int, share: int
) -> None:
    """As one model, or in groups with a model each.

    On a third of the lines, which get the same records as in the whole file, since seeds depend on line numbers.
    """
    source = tmp_path / "in.jsonl"
    kept = [line if i % 3 == 1 else b"\n" for i, line in enumerate(long_job[0].read_bytes().splitlines(keepends=True))]
    source.write_bytes(b"".join(kept))
    shared = ["--model_parallel_size", str(share)]
    done = run_program(*command(directory, source, tmp_path / "out.jsonl"), *shared, ranks=ranks)
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
