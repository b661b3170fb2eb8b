"""Where the ranks of one machine meet: sums and sequences of what they have, through memory that they share.

Over gloo's sockets a sum takes hundreds of microseconds, of which a token of a small model needs 33; here it takes few.
Knows processes and tensors; knows no layers. How turns are taken is said in native/ranks.c.
"""

import mmap
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import broadcast_object, group
from .kernels import dispatch as kernels

SHARED = Path("/dev/shm")
LINE, SLOT = 64, 1 << 18  # bytes, as in native/ranks.c
SPINS = 20_000  # looks at what a rank says, before a sleep: about as long as a product takes
SECONDS_UNTIL_WORRIED, SECONDS_AT_MOST = 1, 1800  # the latter as torch's groups wait


@dataclass(frozen=True)
class Meeting:
    """Memory that the ranks of a group share: uint8, as native/ranks.c has it. In a rank's line its process follows.

    spins: how often a rank looks for another before it sleeps.
    """

    memory: Tensor
    rank: int
    ranks: int
    spins: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which is overwritten if it is contiguous. Summed in float32."""
        x = x.contiguous()
        for piece in x.view(-1).split(SLOT // x.itemsize):
            meet = partial(self._meet, f"sum_of_ranks_{kernels.DTYPES[x.dtype]}", piece, len(piece))
            meet()
            kernels.note(meet)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, (..., N), side by side: (..., ranks x N)."""
        found = x.new_empty(self.ranks, *x.shape)
        rows, flat, most = found.view(self.ranks, -1), x.contiguous().view(-1), SLOT // x.itemsize
        for start in range(0, len(flat), most):
            piece = flat[start : start + most]
            self._meet("gather_of_ranks", piece, piece.nbytes, rows[0, start:], rows[0].nbytes)
        return found.movedim(0, -2).flatten(-2)

    def _meet(self, name: str, *what: Tensor | int) -> None:
        """Call a function of ranks.c until all have come. Raises DistError where one has ended, or doesn't come."""
        started, entered = time.monotonic(), 0
        while not kernels.call(name, self.memory, self.rank, self.ranks, *what, self.spins, entered):
            entered = 1
            waited = time.monotonic() - started
            if waited > SECONDS_AT_MOST or (waited > SECONDS_UNTIL_WORRIED and not self._all_alive()):
                raise dist.DistError(f"a rank of this machine has ended, or did not come for {waited:.0f} s")

    def _all_alive(self) -> bool:
        return all(Path(f"/proc/{process}").exists() for process in processes(self.memory, self.ranks).tolist())


def processes(memory: Tensor, ranks: int) -> Tensor:
    """Of each rank: int64 (ranks)."""
    return memory[: ranks * LINE].view(torch.int64).view(ranks, -1)[:, 1]


def arrange() -> Meeting | None:
    """A meeting of this model-parallel group, in which all of its ranks take part; None where they can't meet so.

    That is: on several machines, without shared memory (Linux's), or without the compiled library.
    """
    rank, ranks = group().rank(), group().size()
    if ranks == 1:
        return None
    memory: Tensor | None = None
    path: Path | None = None
    with suppress(OSError):
        if rank == 0 and kernels.library() is not None:
            handle, name = tempfile.mkstemp(prefix="llama-", dir=SHARED)
            path = Path(name)
            with os.fdopen(handle, "wb"):
                os.posix_fallocate(handle, 0, ranks * (LINE + 2 * SLOT))  # if full, an error here, no signal later
    try:
        if (said := broadcast_object(path, group())) is not None:
            memory = mapped(said, rank, ranks)
        everybody: list[bool] = [False] * ranks
        dist.all_gather_object(everybody, memory is not None, group=group())
    finally:
        if path is not None:
            path.unlink()
    if memory is None or not all(everybody):
        return None
    # More ranks than cores let others run at once.
    return Meeting(memory, rank, ranks, SPINS if ranks <= len(os.sched_getaffinity(0)) else 0)


def mapped(path: Path, rank: int, ranks: int) -> Tensor | None:
    """The file's memory, with this process in its line; None where it isn't there, which is so on other machines."""
    if kernels.library() is None:
        return None
    with suppress(OSError, ValueError), path.open("r+b") as f:
        memory = torch.frombuffer(mmap.mmap(f.fileno(), 0), dtype=torch.uint8)
        processes(memory, ranks)[rank] = os.getpid()
        return memory
    return None
