"""Groups of ranks that wait for each other for a long time.

Knows process groups; knows no engine.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from .. import parallel


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
