"""Which of the processes that torchrun started this one is, before a process group is initialized too; slow groups.

torch is imported where it is used, so that a program that prints and ends needn't load it.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

from ..errors import LlamaError, shorten

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun sets for each process


def env_rank() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), from torchrun's environment variables; (0, 1, 0) without torchrun.

    One of the variables alone, which other programs set too, says nothing.
    """
    values = [os.environ.get(name, "") for name in NAMES]
    if not all(value.isdecimal() for value in values):
        return 0, 1, 0
    rank, world_size, local_rank = map(int, values)
    return rank, world_size, local_rank


def checked_env_rank() -> tuple[int, int, int]:
    """As `env_rank`. Raises LlamaError for variables that speak of several processes, but not as torchrun does.

    They are not checked where a process group is initialized already.
    """
    import torch.distributed as dist

    rank, world_size, local_rank = env_rank()
    missing = [name for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    fits = not missing and all(value.isdecimal() for value in found.values()) and local_rank <= rank < world_size
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if several and not fits and not dist.is_initialized():
        shown = ", ".join(f"{name}={shorten(value)}" for name, value in found.items())
        raise LlamaError(
            f"the environment has {shown}{', and no ' * bool(missing)}{' and no '.join(missing)}: expected what "
            "torchrun sets; start with torchrun --nproc_per_node N, or unset RANK to run one process"
        )
    return rank, world_size, local_rank


def is_main_process() -> bool:
    """Whether this process talks to the user: rank 0."""
    import torch.distributed as dist

    return (dist.get_rank() if dist.is_initialized() else env_rank()[0]) == 0


def has_other_ranks() -> bool:
    """Whether the process group has other processes than this one."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def is_lost_rank(e: BaseException) -> bool:
    """Whether a collective operation failed because another rank has ended."""
    import torch.distributed as dist

    return has_other_ranks() and isinstance(e, RuntimeError) and ("gloo" in str(e) or isinstance(e, dist.DistError))


def new_long_timeout_group() -> "dist.ProcessGroup | None":
    """A group of all ranks that waits for 30 days; None where there is one rank.

    It is for steps that take long on one rank, such as waiting for a person who types. Other groups give up after
    minutes, as if the rank were dead.
    """
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(days=30)) if dist.get_world_size() > 1 else None


@contextlib.contextmanager
def long_timeout_group() -> "Iterator[dist.ProcessGroup | None]":
    """A `new_long_timeout_group` that is destroyed afterwards, since each holds sockets and threads."""
    import torch.distributed as dist

    ranks = new_long_timeout_group()
    try:
        yield ranks
    finally:
        if ranks is not None:
            dist.destroy_process_group(ranks)
