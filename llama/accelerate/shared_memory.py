"""All-reduce and all-gather of the ranks of one machine, through memory that they share.

Over gloo's sockets an all-reduce takes hundreds of microseconds, and a token of a small model needs 33 of them; here it
takes few. Knows processes and tensors; knows no layers. kernels/csrc/ranks.c says how ranks take turns.
"""

import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .._util.processes import has_ended, machine_name
from ..parallel import broadcast_object, group
from .kernels import cpu

LINE, SLOT = 64, 1 << 18  # bytes, as in csrc/ranks.c
SPINS = 20_000  # looks at another rank's counter before a sleep: about as long as a product takes
SECONDS_UNTIL_WORRIED, SECONDS_AT_MOST = 1, 1800  # the latter as torch's groups wait


@dataclass(frozen=True)
class SharedMemory:
    """Memory that the ranks of a group share."""

    memory: Tensor  # uint8, as csrc/ranks.c has it; a rank's line ends with the id of its process
    rank: int
    ranks: int
    spins: int  # how often a rank looks for another before it sleeps
    entered: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))  # as csrc/ranks.c leaves it

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in float32. Overwrites x if it is contiguous."""
        x = x.contiguous()
        for piece in x.view(-1).split(SLOT // x.itemsize):
            self._exchange(f"sum_of_ranks_{cpu.DTYPES[x.dtype]}", piece, len(piece), written=piece)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, (..., N), side by side: (..., ranks x N)."""
        x, columns, count = x.contiguous(), x.shape[-1], math.prod(x.shape[:-1])
        y = x.new_empty(*x.shape[:-1], self.ranks * columns)
        rows, targets = x.view(count, columns), y.view(count, self.ranks, columns)
        wide = SLOT // x.itemsize  # numbers that go through the memory at a time: whole rows, or a part of one
        for row in range(0, count, max(wide // max(columns, 1), 1)):
            for start in range(0, columns, wide):
                piece = rows[row : row + max(wide // columns, 1), start : start + wide]
                sizes = len(piece), piece[0].nbytes
                strides = targets[0].nbytes, rows[0].nbytes
                self._exchange("gather_of_ranks", piece, *sizes, targets[row:, 0, start:], *strides, written=y)
        return y

    def _exchange(self, name: str, *arguments: Tensor | int, written: Tensor) -> None:
        """Call a function of ranks.c until all ranks have come. Raises DistError if one has ended or doesn't come."""
        own = (self.memory, self.rank, self.ranks)
        written_too = (self.memory, self.entered, written)
        cpu.run(name, *own, *arguments, self.spins, self.entered, writes=written_too, wait_on=self._wait_on)

    def _wait_on(self, waited: float) -> None:
        if waited > SECONDS_AT_MOST or (waited > SECONDS_UNTIL_WORRIED and not self._all_alive()):
            raise dist.DistError(f"a rank of this machine has ended, or did not come for {waited:.0f} s")

    def _all_alive(self) -> bool:
        return not any(map(has_ended, processes(self.memory, self.ranks).tolist()))


def processes(memory: Tensor, ranks: int) -> Tensor:
    """The process of each rank: int64 (ranks)."""
    return memory[: ranks * LINE].view(torch.int64).view(ranks, -1)[:, 1]


def share_memory() -> SharedMemory | None:
    """Memory shared by this model-parallel group. All of its ranks call this.

    None on several machines, without shared memory (Linux's), or without the compiled library.
    """
    rank, ranks = group().rank(), group().size()
    if ranks == 1:
        return None
    memory: Tensor | None = None
    handle = create_memory(ranks) if rank == 0 and cpu.library() is not None else None
    try:
        place = None if handle is None else (machine_name(), Path(f"/proc/{os.getpid()}/fd/{handle}"))
        if (shared := broadcast_object(place, group())) is not None and shared[0] == machine_name():
            memory = map_memory(shared[1], rank, ranks)
        has_it: list[bool] = [False] * ranks
        dist.all_gather_object(has_it, memory is not None, group=group())
    finally:
        if handle is not None:
            os.close(handle)
    if memory is None or not all(has_it):
        return None
    # More ranks than cores let others run at once.
    return SharedMemory(memory, rank, ranks, SPINS if ranks <= len(os.sched_getaffinity(0)) else 0)


def create_memory(ranks: int) -> int | None:
    """A file descriptor of memory without a name, which goes with the last process that has it; None without any."""
    handle = None
    try:
        handle = os.memfd_create("llama-ranks")
        os.posix_fallocate(handle, 0, ranks * (LINE + 2 * SLOT))  # without room an error here, and no signal later
    except (AttributeError, OSError):  # not Linux; or none left
        if handle is not None:
            os.close(handle)
        return None
    return handle


def map_memory(path: Path, rank: int, ranks: int) -> Tensor | None:
    """The memory at `path`, with this process in its rank's line; None where it can't be had."""
    if cpu.library() is None:
        return None
    with suppress(OSError, ValueError), path.open("r+b") as f:
        memory = torch.frombuffer(mmap.mmap(f.fileno(), 0), dtype=torch.uint8)
        processes(memory, ranks)[rank] = os.getpid()
        return memory
    return None
