"""What tests/accelerate/test_shared_memory.py runs on ranks, and as a program that is killed.

python tests/shared_memory_program.py DIRECTORY

Every rank writes its process id to DIRECTORY/pid.RANK; then rank 0 waits for rank 1, which sleeps.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llama import parallel
from llama._util.processes import machine_name
from llama.accelerate import shared_memory
from llama.accelerate.shared_memory import SharedMemory, share_memory
from llama.cli.program import errors_in_one_line

SHAPES = [(1,), (3, 7), (2, 1, 5), (70, 1999), (3, 0), (1, 1, 64), (300_001,), (5, 90_000)]


def begin() -> SharedMemory:
    parallel.initialize(device="cpu", dtype="float32")
    shared = share_memory()
    assert shared is not None
    return shared


def odd_numbers() -> torch.Tensor:
    rank = dist.get_rank()
    return torch.tensor([1.0, float("nan") if rank == 1 else 1.0, float("inf") if rank == 0 else 0.0])


def check_sums_and_sequences() -> None:
    shared, rank, ranks = begin(), dist.get_rank(), dist.get_world_size()
    numbers = torch.Generator().manual_seed(0)
    for shape in SHAPES * 3:
        for dtype in (torch.float32, torch.bfloat16):
            everybody = torch.randn(ranks, *shape, generator=numbers).to(dtype)
            own = everybody[rank].clone()
            assert torch.equal(shared.all_gather(own), torch.cat(list(everybody), dim=-1)), (shape, dtype)
            turned = torch.cat([x.mT if x.ndim > 1 else x for x in everybody], dim=-1)
            assert torch.equal(shared.all_gather(own.mT if own.ndim > 1 else own), turned), (shape, dtype)
            total = everybody.float()[0]
            for x in everybody.float()[1:]:
                total = total + x
            assert torch.equal(shared.all_reduce(own), total.to(dtype)), (shape, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        found = shared.all_reduce(odd_numbers().to(dtype, copy=True))
        assert found[0] == ranks and found[1].isnan() and found[2].isinf()


def shares_memory_without() -> list[bool]:
    """Whether ranks meet where memory is missing on none of them, on either, and on both; and on several machines."""
    parallel.initialize(device="cpu", dtype="float32")
    create_memory, map_memory = shared_memory.create_memory, shared_memory.map_memory
    rank, here = dist.get_rank(), machine_name()
    shared = []
    for missing in ([], [0], [1], [0, 1]):
        is_missing = rank in missing
        shared_memory.create_memory = (lambda ranks: None) if is_missing else create_memory
        shared_memory.map_memory = (lambda *_: None) if is_missing else map_memory
        shared.append(share_memory() is not None)
    shared_memory.create_memory, shared_memory.map_memory = create_memory, map_memory
    for names in ([here, here], [here, "another"], [None, "another"]):
        shared_memory.machine_name = lambda name=names[rank]: name
        shared.append(share_memory() is not None)
    return shared


def wait_for_each_other(directory: str) -> None:
    shared, rank = begin(), dist.get_rank()
    Path(f"{directory}/pid.{rank}").write_text(str(os.getpid()))
    with errors_in_one_line():
        while True:
            if rank == 1:
                time.sleep(1000)
            shared.all_reduce(odd_numbers())


if __name__ == "__main__":
    wait_for_each_other(sys.argv[1])
