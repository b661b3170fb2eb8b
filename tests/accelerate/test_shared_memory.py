"""Sums and sequences through shared memory: those of torch's collectives; and a rank that ends is noticed."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from rank_pool import RankPool
from shared_memory_program import check_sums_and_sequences, shares_memory_without
from tiny import ROOT, environment, launched

from llama.accelerate.kernels import cpu

shared = pytest.mark.skipif(
    cpu.library() is None or not hasattr(os, "memfd_create"), reason="ranks meet where there is shared memory"
)


def left_behind() -> set[Path]:
    return set(Path("/dev/shm").glob("*llama-*"))


@shared
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_and_sequences(pool: RankPool, ranks: int) -> None:
    before = left_behind()
    pool.run(check_sums_and_sequences, ranks=ranks)
    assert left_behind() <= before, "the memory has no name, and so goes with the ranks"


@shared
def test_a_rank_that_ended_is_noticed(tmp_path: Path) -> None:
    """By the one who waits for it, where no launcher ends it too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waiting, ending = (
        subprocess.Popen(
            launched("tests/shared_memory_program.py", str(tmp_path)),
            cwd=ROOT,
            env={**environment(), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    pids, end = [tmp_path / "pid.0", tmp_path / "pid.1"], time.monotonic() + 90
    while not all(p.exists() and p.read_text() for p in pids):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    ending.kill()
    ending.communicate()
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 1
    assert said == "error: rank 0 has lost rank 1, which has ended\n"


@shared
def test_without_shared_memory_ranks_use_sockets(pool: RankPool) -> None:
    """Where it can't be had, on one rank or on all, none of them meets; also where the ranks are on several machines,
    whose files differ."""
    expected = [True, False, False, False, True, False, False]
    assert pool.run(shares_memory_without, ranks=2).results == [expected] * 2
