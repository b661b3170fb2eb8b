"""Where this process runs: its device, dtype and process groups, and how ranks share values and errors.

Knows no model and no files. The only global state that it changes is torch.distributed's process groups.
"""

import atexit
import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.distributed as dist

from ._util.device import choose_device, choose_dtype
from ._util.heartbeat import start_heartbeat, stop_heartbeat
from ._util.ranks import checked_env_rank, env_rank
from ._util.ranks import is_main_process as is_main_process
from .errors import LlamaError, shorten, to_one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    device: torch.device
    dtype: torch.dtype
    world_size: int  # all processes
    mp_rank: int  # this rank's number in its model-parallel group
    mp_size: int  # ranks of a model-parallel group


def initialize(
    model_parallel_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Place:
    """Join the process groups, or use those that exist, and return where this rank runs.

    Under torchrun the world is torchrun's; else it is this process alone, without a port or environment variables.
    `model_parallel_size` defaults to the world size; a larger world is divided into data-parallel copies of the
    model-parallel group. Raises LlamaError where numbers or device don't fit.
    """
    start_heartbeat()  # looks at torchrun already while this rank waits for others
    _, world_size, local_rank = checked_env_rank()
    if dist.is_initialized():
        world_size = dist.get_world_size()
    chosen = choose_device(device, local_rank, world_size)
    mp_size = world_size if model_parallel_size is None else model_parallel_size
    if not isinstance(mp_size, int) or mp_size < 1:
        raise LlamaError(f"model_parallel_size is {shorten(mp_size)}, expected a whole number of at least 1")
    if world_size % mp_size:
        raise LlamaError(
            f"model_parallel_size is {mp_size} and the number of processes {world_size}, expected a multiple of it; "
            f"start with torchrun --nproc_per_node {mp_size}"
        )
    if not dist.is_initialized():
        if fs_init.model_parallel_is_initialized():  # left over from a world that was destroyed
            fs_init.destroy_model_parallel()
        join_group(world_size, chosen)
        atexit.register(leave)
    if not fs_init.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines here
            fs_init.initialize_model_parallel(mp_size)
    elif fs_init.get_model_parallel_world_size() != mp_size:
        raise LlamaError(
            f"this process already runs model_parallel_size={fs_init.get_model_parallel_world_size()}, and "
            f"{mp_size} was asked for: build models of different sizes in different processes"
        )
    start_heartbeat()
    return Place(chosen, choose_dtype(dtype, chosen), world_size, fs_init.get_model_parallel_rank(), mp_size)


def join_group(world_size: int, device: torch.device) -> None:
    """Meet the other ranks. Raises LlamaError where they, or their launcher, have ended meanwhile."""
    try:
        if world_size == 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        elif device.type == "cuda":
            # Tensors travel by nccl, and objects such as error messages by gloo, so no rank needs a current device.
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except dist.DistError as e:
        lost = f"rank {env_rank()[0]} has lost its launcher, or a rank that it waited for"
        raise LlamaError(f"{lost}: {to_one_line(e)}") from e


def leave() -> None:
    """Leave the process groups at the program's end, since threads that outlive the interpreter may abort it.

    After an uncaught error this does nothing: the other ranks may not leave their groups, and this rank would wait.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        stop_heartbeat()
        fs_init.destroy_model_parallel()  # drops its references to the groups; else they outlive the next line
        dist.destroy_process_group()


def is_group_leader() -> bool:
    """Whether this rank is the first of its model-parallel group, which samples for the whole group."""
    return fs_init.get_model_parallel_rank() == 0


def is_machine_leader() -> bool:
    """Whether this rank is the first on this machine, which downloads files for all ranks on it."""
    return env_rank()[2] == 0


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor` on every rank of the model-parallel group with the first rank's, and return it."""
    group = fs_init.get_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, fs_init.get_model_parallel_src_rank(), group=group)
    return tensor


def group() -> dist.ProcessGroup:
    """The model-parallel group: the ranks that share one model with this one."""
    return fs_init.get_model_parallel_group()


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The first rank's `value`, on every rank of a group (None: of the whole world)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return box[0]


@contextlib.contextmanager
def raise_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A context for a step that may fail on one rank alone: if it fails on any, all raise LlamaError with its message.

    group: the ranks that take this step; None: the whole world. Without this context, the other ranks would wait in
    their next collective for a rank that has gone. An error that is no LlamaError is raised as it is where it occurred.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        yield
        return
    error: Exception | None = None
    message: str | None = None
    try:
        yield
    except Exception as e:
        error, message = e, str(e) if isinstance(e, LlamaError) else f"{type(e).__name__}: {e}"
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, message, group=group)
    if error is not None and not isinstance(error, LlamaError):
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            on_all_ranks = all(m == message for m in messages)
            shared = LlamaError(message if on_all_ranks else f"rank {rank}: {message}")
            shared.everywhere = True
            raise shared from error
