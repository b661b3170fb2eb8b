"""Tensors on their way to files: on disk while they are converted, and laid out as the libraries want them.

Knows tensors; knows no format.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .schema import New


def allocate_on_disk(directory: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor in a file without a name in `directory`, so that what is converted takes no memory."""
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(dir=directory) as f:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a signal at the first write
            os.posix_fallocate(f.fileno(), 0, max(size * dtype.itemsize, 1))
        else:
            f.truncate(size * dtype.itemsize)
        return torch.from_file(f.name, shared=True, size=size, dtype=dtype).view(*shape)


def make_writable(tensor: Tensor, dtype: torch.dtype | None, new: New) -> Tensor:
    """`tensor` as torch.save and safetensors want it: contiguous, of this dtype, with a storage that holds no more.

    new: allocates the tensor, if the numbers have to be copied.
    """
    if not tensor.is_contiguous() or tensor.dtype != (dtype or tensor.dtype):
        return new(tensor.shape, dtype or tensor.dtype).copy_(tensor)
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
