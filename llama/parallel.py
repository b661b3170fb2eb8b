"""Where we run: device, dtype, process group, model-parallel group, and "am I the one who prints".

Knows no model and no files. Changes nothing global but torch.distributed's process groups, which are what it is for.
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.distributed as dist

from ._util.ranks import env_rank
from ._util.ranks import is_main_process as is_main_process
from .errors import LlamaError

T = TypeVar("T")

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Place:
    """What one rank needs to know of where it runs."""

    device: torch.device
    dtype: torch.dtype
    world_size: int
    mp_rank: int
    mp_size: int


def choose_device(device: str | torch.device | None, local_rank: int, world_size: int) -> torch.device:
    """The device asked for, or the best there is: CUDA (one a rank), then MPS (one process only), then the CPU."""
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise LlamaError(f"device {device!r} is not known: expected cpu, cuda, cuda:N or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise LlamaError(f"device {device!r} is not supported: expected cpu, cuda, cuda:N or mps")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise LlamaError("device 'mps' was asked for, but this machine or this torch has none: use --device cpu")
    if chosen.type == "mps" and world_size > 1:
        raise LlamaError(f"device 'mps' runs one process, not {world_size}: use --device cpu, or no torchrun")
    if chosen.type == "cuda":
        if chosen.index is not None and world_size > 1:
            raise LlamaError(f"device {device!r} would put {world_size} ranks on one GPU: say cuda, for one each")
        count = torch.cuda.device_count()
        index = local_rank if chosen.index is None else chosen.index
        if index >= count:
            raise LlamaError(f"device cuda:{index} was asked for, but {count} CUDA devices are here: use --device cpu")
        chosen = torch.device("cuda", index)
    return chosen


def named_dtype(name: str) -> torch.dtype:
    """The dtype of this name, as torch or as the papers write it."""
    if str(name).removeprefix("torch.") not in DTYPES:
        raise LlamaError(f"dtype {name!r} is not known: expected bfloat16, float16 or float32")
    return DTYPES[str(name).removeprefix("torch.")]


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or bfloat16 where `device` computes in it, else float16 (CUDA, MPS) or float32 (CPU)."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise LlamaError(f"dtype {dtype} is not supported: expected bfloat16, float16 or float32")
        return dtype
    if dtype is not None:
        return named_dtype(dtype)
    if device.type == "cuda":
        # Cards before Ampere only emulate bfloat16.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if mkldnn else torch.float32


def initialize(
    model_parallel_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Place:
    """Join the process groups (or use those that are there) and say where this rank stands.

    Under torchrun the world is torchrun's; otherwise it is this process alone, over a store in its own memory: no
    port to choose, no environment variable. `model_parallel_size` defaults to the world size; a larger world is divided
    into data-parallel copies of the model-parallel group. Raises LlamaError where numbers or device don't fit.
    """
    _, world_size, local_rank = env_rank()
    if dist.is_initialized():
        world_size = dist.get_world_size()
    chosen = choose_device(device, local_rank, world_size)
    mp_size = world_size if model_parallel_size is None else model_parallel_size
    if not isinstance(mp_size, int) or mp_size < 1:
        raise LlamaError(f"model_parallel_size is {mp_size!r}, expected a whole number of at least 1")
    if world_size % mp_size:
        raise LlamaError(
            f"model_parallel_size is {mp_size} and {world_size} processes run: the processes must be a multiple of it; "
            f"start with torchrun --nproc_per_node {mp_size}"
        )
    if not dist.is_initialized():
        if fs_init.model_parallel_is_initialized():  # of a world that was since destroyed
            fs_init.destroy_model_parallel()
        if world_size == 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        elif chosen.type == "cuda":
            # Tensors travel by nccl and objects, such as error messages, by gloo: no rank needs a current device.
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
        atexit.register(leave)
    if not fs_init.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # for a moment: fairscale prints three lines here
            fs_init.initialize_model_parallel(mp_size)
    elif fs_init.get_model_parallel_world_size() != mp_size:
        raise LlamaError(
            f"this process already runs model_parallel_size={fs_init.get_model_parallel_world_size()}, and "
            f"{mp_size} was asked for: build models of different sizes in different processes"
        )
    return Place(chosen, choose_dtype(dtype, chosen), world_size, fs_init.get_model_parallel_rank(), mp_size)


def leave() -> None:
    """Leave the process groups at the program's end: threads of theirs that outlive the interpreter may abort it.

    After an error nobody caught they are left alone, since the other ranks may not come to leave them too.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        fs_init.destroy_model_parallel()  # which lets go of the groups; else they outlive the next line
        dist.destroy_process_group()


def available_memory(device: torch.device) -> int:
    """Bytes that a program may hope to get on `device`: what is free on a GPU, all that a CPU's machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def leads_group() -> bool:
    """Whether this rank is the first of its model-parallel group: the one that samples for all of it."""
    return fs_init.get_model_parallel_rank() == 0


def leads_machine() -> bool:
    """Whether this rank is the first of those on this machine: the one that fetches files for all of them."""
    return env_rank()[2] == 0


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor`, on every rank of a model-parallel group, with that of the group's first rank."""
    group = fs_init.get_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, fs_init.get_model_parallel_src_rank(), group=group)
    return tensor


def group() -> dist.ProcessGroup:
    """The ranks that share one model with this one."""
    return fs_init.get_model_parallel_group()


def patient_group() -> dist.ProcessGroup | None:
    """All ranks, in a group that waits for days: for a person at a keyboard, whom other groups take for a dead rank."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30)) if dist.get_world_size() > 1 else None


@contextlib.contextmanager
def patience() -> Iterator[dist.ProcessGroup | None]:
    """A `patient_group` for a while: each of them holds sockets and threads."""
    ranks = patient_group()
    try:
        yield ranks
    finally:
        if ranks is not None:
            dist.destroy_process_group(ranks)


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The `value` that the first rank of a group has, on every rank of it; None: of the whole world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return box[0]


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A step that may fail on one rank alone: if it fails on any, all of them raise LlamaError with that message.

    group: the ranks that take this step; None: the whole world. Without this, the others would wait in their next
    collective for a rank that has gone.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    messages: list[str | None] = [None] * dist.get_world_size(group)
    own = error if error is None or isinstance(error, LlamaError) else f"{type(error).__name__}: {error}"
    dist.all_gather_object(messages, None if own is None else str(own), group=group)
    if error is not None and not isinstance(error, LlamaError):
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            alike = all(m == message for m in messages)
            shared = LlamaError(message if alike else f"rank {rank}: {message}")
            shared.everywhere = True
            raise shared from error
