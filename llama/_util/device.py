"""Devices and dtypes: those that a user names, and the best there are.

Knows torch; knows no ranks beyond their number.
"""

import os
import re

import torch

from ..errors import LlamaError, shorten
from .validate import suggest

DTYPES = {  # by the names that users may give
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
FEW_BITS = re.compile(r"(float|fp|f|e4m3|e5m2|u?int|i|q|nf|w|^)_?[2-8]($|[^0-9])|bit")  # such as fp8, int4, q4_0, 8bit


def choose_device(device: str | torch.device | None, local_rank: int, world_size: int) -> torch.device:
    """The device asked for, or the best there is: CUDA (one for each rank), MPS (one process only), or the CPU.

    Raises LlamaError for a device that is unknown, missing, or can't serve all ranks.
    """
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise LlamaError(f"device {shorten(device)} is not known: expected cpu, cuda, cuda:N or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise LlamaError(f"device {shorten(device)} is not supported: expected cpu, cuda, cuda:N or mps")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise LlamaError(
            "device 'mps' was asked for, but this machine or this torch has none: use --device cpu (device='cpu')"
        )
    if chosen.type == "mps" and world_size > 1:
        raise LlamaError(
            f"device 'mps' runs one process, not {world_size}: use --device cpu (device='cpu'), or no torchrun"
        )
    if chosen.type == "cuda":
        if chosen.index is not None and world_size > 1:
            raise LlamaError(
                f"device {shorten(device)} would put {world_size} ranks on one GPU: use cuda, for one each"
            )
        count = torch.cuda.device_count()
        index = local_rank if chosen.index is None else chosen.index
        if index >= count:
            raise LlamaError(
                f"device cuda:{index} was asked for, but {count} CUDA devices are here: use --device cpu (device='cpu')"
            )
        chosen = torch.device("cuda", index)
    return chosen


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as "bfloat16", "bf16" or "torch.bfloat16". Raises LlamaError."""
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise LlamaError(f"dtype {shorten(name)} is not known: {_expected_dtypes(plain)}")
    return DTYPES[plain]


def _expected_dtypes(name: str) -> str:
    """For an error message: what may be given instead of `name`."""
    expected = "expected bfloat16, float16 or float32"
    if FEW_BITS.search(name.lower()):
        return f"{expected}; to keep matrices in 8 or 4 bits, give --quantization int8 or int4 (quantization='int8')"
    return expected + suggest(name, DTYPES, similarity=0.86)


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the best for `device`: bfloat16 if it computes in it, else float16, on a CPU float32."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise LlamaError(f"dtype {dtype} is not supported: {_expected_dtypes(str(dtype))}")
        return dtype
    if dtype is not None:
        return parse_dtype(dtype)
    if device.type == "cuda":
        # GPUs before Ampere only emulate bfloat16.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if mkldnn else torch.float32


def available_memory(device: torch.device) -> int:
    """Bytes that a program can get on `device`: of a GPU the free memory, of a CPU all of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
