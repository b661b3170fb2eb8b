"""Memory as the system hands it out: large pages for what is read all the time, and what is let go of.

Knows addresses; knows no format. Pages that were read of a mapped file count as this process's memory until it lets go
of them; the system keeps them cached.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

DONTNEED = 4  # Linux's MADV_DONTNEED: what is touched again is read from the file again
LARGE_PAGE = 1 << 21


def in_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor of the CPU in pages of 2 MiB, where the system has them (Linux's transparent huge pages).

    One core then reads it half as fast again: it looks up fewer addresses, and prefetches beyond 4 KiB.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE  # what stands before it is never touched, and so takes no memory
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // LARGE_PAGE * LARGE_PAGE)
    return whole[start : start + size].view(dtype).view(*shape)


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses, (first, end), where files are mapped. On other systems than Linux: none."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as f:
            lines = [line.split(maxsplit=5) for line in f]
    except OSError:
        return []
    files = [line[0].split("-") for line in lines if line[4] != "0"]  # an inode
    return [(int(first, 16), int(end, 16)) for first, end in files]


def let_go(tensor: Tensor, ranges: list[tuple[int, int]]) -> None:
    """Release the pages of a contiguous tensor that nobody has written to, if it lies in one of `ranges`."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if any(a <= start and end <= b for a, b in ranges):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)


def trim() -> None:
    """Give what was freed back to the system, where the C library keeps it for later (glibc)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
