"""Memory of the KV cache's slots: mapped at once, taken from the machine page by page as it is written, given back.

Unwritten pages read as zeros. Knows bytes and pages; knows no layer and no token.
"""

import mmap
import sys
from math import prod

import torch
from torch import Tensor

NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # more may be mapped than the machine has


class SlotMemory:
    """A tensor (slots, ...), whose parts take memory once they are written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._pages: mmap.mmap | None = None
        if device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            self._pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=flags)
            self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def release(self, part: Tensor) -> None:
        """Give back the memory of a part of the tensor that lies in one piece; it may then read as zeros, or not."""
        if self._pages is None:
            return
        begin = part.data_ptr() - self.tensor.data_ptr()
        first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._pages.madvise(mmap.MADV_DONTNEED, first, end - first)
