"""A rank that is lost ends the others within seconds, whatever they do; one that is slow, or leaves, ends nobody."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import heartbeat_program as program
import pytest
from rank_pool import RankPool
from tiny import ROOT, environment, launched

from llama._util.processes import find_process, has_ended

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells of processes here")

SECONDS = 10  # within which all have ended
LOST = "error: rank 0 has lost rank 1, "


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (program.stop_one, LOST + "which was stopped by a signal"),
        (program.stop_one_while_computing, LOST + "which was stopped by a signal"),
        (program.fork_and_go_on, LOST + "which was stopped by a signal"),
        (program.end_as_stranger, LOST + "which has ended"),
        pytest.param(program.be_silent_as_stranger, LOST + "which was silent for 1 s", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_others(pool: RankPool, function: Callable[[], None], message: str) -> None:
    with pytest.raises(AssertionError) as failed:
        pool.run(function, ranks=2, timeout=30)
    assert str(failed.value).splitlines()[1:] == [message]


@pytest.mark.parametrize(
    "function",
    [program.leave_early, program.hold_the_interpreter, program.go_on_as_strangers],
)
def test_a_slow_rank_and_one_that_leaves_end_nobody(pool: RankPool, function: Callable[[], object]) -> None:
    done = pool.run(function, ranks=2)
    assert done.stderr == ""
    assert done.results[0] == done.results[1]


def test_strangers_are_no_ranks(pool: RankPool) -> None:
    assert pool.run(program.strangers_call, ranks=3).results == [2.0] * 3


@pytest.mark.parametrize("ranks", [0, 1])
def test_nobody_looks_where_nobody_else_is(pool: RankPool, ranks: int) -> None:
    assert pool.run(count_heartbeats, ranks=ranks).results == [0]


def count_heartbeats() -> int:
    program.begin()
    return int(program.heartbeat.find_heartbeat() is not None)


# --- real processes ---------------------------------------------------------------------------------------------------


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Job:
    """The program on two ranks, which both have begun to count."""

    def __init__(self, directory: Path, what: str, start: str):
        self.directory = directory
        command = [str(ROOT / "tests/heartbeat_program.py"), str(directory), what]
        torchrun = start == "torchrun"
        self.launcher = subprocess.Popen(
            launched(*command, ranks=2) if torchrun else [sys.executable, *command, start],
            cwd=ROOT,
            env=environment(),
            stderr=(directory / "stderr").open("w"),
        )
        wait_until(lambda: all(self.count(rank) > 1 for rank in (0, 1)), 90)
        self.ranks = [int((directory / f"pid.{rank}").read_text()) for rank in (0, 1)]

    def count(self, rank: int) -> int:
        path = self.directory / f"count.{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def errors(self) -> list[str]:
        lines = (self.directory / "stderr").read_text().splitlines()
        return sorted(line for line in lines if line.startswith("error: "))


@contextmanager
def running(directory: Path, what: str, start: str) -> Iterator[Job]:
    job = Job(directory, what, start)
    try:
        yield job
    finally:
        for process in (*job.ranks, job.launcher.pid):
            if find_process(process):
                os.kill(process, signal.SIGKILL)
        job.launcher.wait()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["torchrun", "fork", "spawn"])
@pytest.mark.parametrize("what", ["computing", "waiting"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_killed_and_stopped_ranks(tmp_path: Path, sent: signal.Signals, what: str, start: str) -> None:
    """A launcher that never asks for its children leaves a killed one as a zombie."""
    with running(tmp_path, what, start) as job:
        os.kill(job.ranks[1], sent)
        wait_until(lambda: all(map(has_ended, job.ranks)), SECONDS)
        if start == "torchrun":
            assert job.launcher.wait(SECONDS) != 0
        if start != "torchrun" or sent == signal.SIGSTOP:  # torchrun may be the first to end the others
            (error,) = job.errors()
            how = "has ended" if sent == signal.SIGKILL else "was stopped by a signal"
            assert error == f"{LOST}which {how}"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["torchrun", "spawn"])
@pytest.mark.parametrize("what", ["computing", "waiting"])
def test_a_killed_launcher(tmp_path: Path, what: str, start: str) -> None:
    with running(tmp_path, what, start) as job:
        job.launcher.kill()
        wait_until(lambda: all(map(has_ended, job.ranks)), SECONDS)
        told = f"has lost its launcher (process {job.launcher.pid}), which has ended"
        assert any(told in error for error in job.errors()), "one sees it first, and the other may see that one end"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["rank", "launcher"])
def test_before_all_have_started(tmp_path: Path, lost: str) -> None:
    with running(tmp_path, "starting", "torchrun") as job:
        os.kill(
            job.ranks[1] if lost == "rank" else job.launcher.pid, signal.SIGSTOP if lost == "rank" else signal.SIGKILL
        )
        wait_until(lambda: has_ended(job.ranks[0]), SECONDS)
        told = "rank 1, which was stopped by a signal" if lost == "rank" else "its launcher"
        assert job.errors()[0].startswith(f"error: rank 0 has lost {told}")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["torchrun", "fork"])
def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path: Path, start: str) -> None:
    with running(tmp_path, "computing", start) as job:
        everybody = (*job.ranks, job.launcher.pid)
        for process in everybody:
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.5)
        before = job.count(0)
        time.sleep(15)
        for process in everybody:
            os.kill(process, signal.SIGCONT)
            time.sleep(0.5)
        time.sleep(SECONDS)
        assert not any(map(has_ended, job.ranks))
        wait_until(lambda: job.count(0) > before + 1 and job.count(1) > before + 1, SECONDS)
        assert job.errors() == []
