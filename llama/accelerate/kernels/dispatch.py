"""The functions of a layer that have kernels, on any device: C's on the CPU, Triton's on a GPU.

Knows tensors; knows no layers. `is_available` says whether there are kernels for a tensor's device and dtype.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .cpu import DTYPES, WORD

MOST_ROWS_ON_GPU = 16  # of x, in a product with integers on a GPU: as many as a tensor core multiplies at a time
GPU_DTYPES = (*DTYPES, torch.float16)


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """The module of Triton's kernels; None if they don't run, without a GPU, Triton or the compiler that it needs."""
    if not torch.cuda.is_available():
        return None
    try:
        from . import triton

        triton.swiglu(*torch.ones(2, 16, device="cuda"))
    except Exception:  # Triton and torch raise many kinds of errors
        return None
    return triton


def can_compute(x: Tensor) -> bool:
    """Whether kernels compute with tensors such as `x`, if there are kernels for its device."""
    if x.device.type == "cuda":  # `register` has looked for the kernels before anything is compiled
        return x.dtype in GPU_DTYPES and (bool(GPU) if torch.compiler.is_compiling() else gpu_kernels() is not None)
    return x.device.type == "cpu" and x.dtype in DTYPES


def can_attend(x: Tensor, seqlen: int) -> bool:
    """Whether `attention` takes so many tokens a row; on a GPU it takes one."""
    return can_compute(x) and (seqlen == 1 or x.device.type == "cpu")


def runs_on_cpu(x: Tensor) -> bool:
    """Whether the CPU's functions compute with `x` now: outside of torch.compile, and where they were compiled."""
    is_fitting = x.device.type == "cpu" and x.dtype in DTYPES
    return is_fitting and not torch.compiler.is_compiling() and cpu.library() is not None


def is_available(like: Tensor) -> bool:
    """Whether there are kernels for tensors such as this one."""
    with torch.cuda.device_of(like):  # the device to try kernels on
        return can_compute(like) and (like.device.type == "cuda" or cpu.library() is not None)


def can_pack(weight: Tensor) -> bool:
    """Whether this matrix can be packed as it is: on a CPU that has kernels, if its rows are whole words."""
    return (
        weight.device.type == "cpu"
        and is_available(weight)
        and weight.ndim == 2
        and weight.shape[1] * weight.itemsize % WORD == 0
    )


OPERATORS: dict[str, Callable[..., Tensor]] = {}  # once `register` was called
LIBRARIES: list[torch.library.Library] = []
GPU: list[ModuleType] = []  # the module of the GPU's kernels, if there are any, once `register` was called
OUTPUTS: dict[str, Callable[..., Tensor]] = {  # the shape of each function's result, for torch.compile
    "product": lambda x, packed, rows: x.new_empty(*x.shape[:-1], rows),
    "integer_product": lambda x, integers, scales, rows, bits: x.new_empty(*x.shape[:-1], rows),
    "rms_norm": lambda x, *_: x.new_empty(x.shape),
    "swiglu": lambda x, *_: x.new_empty(x.shape),
    "attention": lambda x, *_: x.new_empty(x.shape),
}


@functools.cache
def register() -> None:
    """Make the functions known to torch's dispatcher, in `torch.ops.llama`. Call it before anything is compiled."""
    library, module = torch.library.Library("llama", "FRAGMENT"), gpu_kernels()
    GPU.extend([] if module is None else [module])
    for name, output in OUTPUTS.items():
        function = getattr(cpu, name)
        # Attention writes to its caches, which needn't be declared: nothing else in a step touches them.
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CPU")
        if hasattr(module, name):
            library.impl(name, getattr(module, name), "CUDA")
        torch.library.register_fake(f"llama::{name}", output, lib=library)
        OPERATORS[name] = getattr(torch.ops.llama, name).default
    LIBRARIES.append(library)  # the operators live as long as the library does


def dispatch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that calls this one of the CPU, or the GPU's of the same name.

    In torch.compile it is one operator that the compiler doesn't look into.
    """

    @functools.wraps(function)
    def call(x: Tensor, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return OPERATORS[function.__name__](x, *arguments)
        if x.device.type == "cuda":
            return getattr(gpu_kernels(), function.__name__)(x, *arguments)
        return function(x, *arguments)

    return call


product = dispatch(cpu.product)
integer_product = dispatch(cpu.integer_product)
rms_norm = dispatch(cpu.rms_norm)
swiglu = dispatch(cpu.swiglu)
attention = dispatch(cpu.attention)
