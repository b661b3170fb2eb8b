"""Groups of ranks that wait for each other for a long time, and calls that all ranks of a model make alike.

Knows process groups; knows no engine.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import timedelta

import torch.distributed as dist

from .. import parallel
from .._util.agreement import digest

IN_CALL: ContextVar[bool] = ContextVar("whether a call is made that all ranks make", default=False)


@contextlib.contextmanager
def long_timeout_group() -> Iterator[dist.ProcessGroup]:
    """The model-parallel group once more, on the CPU, whose ranks wait 30 days for each other. All ranks call it."""
    size = parallel.group().size()
    firsts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(i, i + size)), timedelta(days=30), "gloo") for i in firsts]
    own = groups[dist.get_rank() // size]
    try:
        yield own
    finally:
        dist.destroy_process_group(own)  # since each holds sockets and threads


@contextlib.contextmanager
def leaders_group() -> Iterator[dist.ProcessGroup | None]:
    """The first ranks of all model-parallel groups, which wait 30 days for each other; None where there is one group.

    All ranks call it; only those in the group may use it.
    """
    size, world_size = parallel.group().size(), dist.get_world_size()
    if size == world_size:
        yield None
        return
    leaders = dist.new_group(list(range(0, world_size, size)), timedelta(days=30), "gloo")
    try:
        yield leaders
    finally:
        if parallel.is_group_leader():
            dist.destroy_process_group(leaders)


@contextlib.contextmanager
def call_together(call: str, **arguments: object) -> Iterator[None]:
    """As `raise_together` for the model-parallel group, and all raise LlamaError that made different calls.

    Calls that a call makes in this context are no calls of their own.
    """
    if parallel.group().size() == 1 or IN_CALL.get():
        yield
        return
    token = IN_CALL.set(True)
    try:
        with parallel.raise_together(
            parallel.group(), {"call": call, **{name: digest(value) for name, value in arguments.items()}}
        ):
            yield
    finally:
        IN_CALL.reset(token)
