"""Sums and sequences through shared memory: those of torch's collectives; and a rank that ends is noticed."""

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tiny import environment, launched, run_program

from llama.accelerate.kernels import cpu

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from llama import parallel
from llama.accelerate.shared_memory import share_memory

place = parallel.initialize(device="cpu", dtype="float32")
shared, rank, ranks = share_memory(), dist.get_rank(), dist.get_world_size()
assert shared is not None
numbers = torch.Generator().manual_seed(0)
for shape in [(1,), (3, 7), (2, 1, 5), (70, 1999), (3, 0), (1, 1, 64), (300_001,), (5, 90_000)] * 3:
    for dtype in (torch.float32, torch.bfloat16):
        everybody = torch.randn(ranks, *shape, generator=numbers).to(dtype)
        own = everybody[rank].clone()
        found = shared.all_gather(own)
        assert torch.equal(found, torch.cat(list(everybody), dim=-1)), (shape, dtype)
        assert torch.equal(shared.all_gather(own.mT if own.ndim > 1 else own), torch.cat(
            [x.mT if x.ndim > 1 else x for x in everybody], dim=-1)), (shape, dtype)
        total = everybody.float()[0]
        for x in everybody.float()[1:]:
            total = total + x
        assert torch.equal(shared.all_reduce(own), total.to(dtype)), (shape, dtype)
odd = torch.tensor([1.0, float("nan") if rank == 1 else 1.0, float("inf") if rank == 0 else 0.0])
for dtype in (torch.float32, torch.bfloat16):
    found = shared.all_reduce(odd.to(dtype, copy=True))
    assert found[0] == ranks and found[1].isnan() and found[2].isinf()
if sys.argv[1] == "end":
    print("done") if rank == 0 else None
else:
    import os, time
    open(f"{sys.argv[2]}/pid.{rank}", "w").write(str(os.getpid()))
    from llama.cli.program import errors_in_one_line
    with errors_in_one_line():
        while True:
            if rank == 1:
                time.sleep(1000)
            shared.all_reduce(odd)
"""

shared = pytest.mark.skipif(
    cpu.library() is None or not Path("/dev/shm").is_dir(), reason="ranks meet where there is shared memory"
)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "shared_memory_program.py"
    path.write_text(PROGRAM)
    return path


def left_behind() -> set[Path]:
    return set(Path("/dev/shm").glob("llama-*"))


@shared
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_and_sequences(program: Path, ranks: int) -> None:
    before = left_behind()
    done = run_program(str(program), "end", ranks=ranks)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert left_behind() <= before, "the memory has no name while it is used, and so goes with the ranks"


@shared
def test_a_rank_that_ended_is_noticed(program: Path, tmp_path: Path) -> None:
    """By the one who waits for it, where no launcher ends it too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waiting, ending = (
        subprocess.Popen(
            launched(str(program), "wait", str(tmp_path)),
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
    assert said == "error: rank 0 has lost another rank, which has ended\n"


@shared
def test_without_shared_memory_ranks_use_sockets(tmp_path: Path) -> None:
    """Where it can't be had, on one rank or on all, none of them meets; also where the ranks are on several machines,
    whose files differ."""
    path = tmp_path / "elsewhere.py"
    path.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from llama import parallel\n"
        "from llama.accelerate import shared_memory\n"
        "parallel.initialize(device='cpu', dtype='float32')\n"
        "found = []\n"
        "for missing in ([], [0], [1], [0, 1]):\n"
        "    own = Path(f'{sys.argv[1]}/none') if int(os.environ['RANK']) in missing else Path('/dev/shm')\n"
        "    shared_memory.SHARED = own\n"
        "    find = shared_memory.map_memory\n"
        "    shared_memory.map_memory = lambda path, *rest: find(own / path.name, *rest)\n"
        "    found.append(shared_memory.share_memory() is not None)\n"
        "    shared_memory.map_memory = find\n"
        "Path(f'{sys.argv[1]}/out.' + os.environ['RANK']).write_text(json.dumps(found))\n"
    )
    done = run_program(str(path), str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)] == [[True, False, False, False]] * 2
