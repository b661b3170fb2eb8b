"""Which of the processes that torchrun started this one is. Answers before a process group is initialized, too.

torch is imported where it is used, so that a program that prints and ends needn't load it.
"""

import os


def env_rank() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), from torchrun's environment variables; (0, 1, 0) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return 0, 1, 0
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return rank, world_size, local_rank


def is_main_process() -> bool:
    """Whether this process talks to the user: rank 0."""
    import torch.distributed as dist

    return (dist.get_rank() if dist.is_initialized() else env_rank()[0]) == 0


def has_other_ranks() -> bool:
    """Whether the process group has other processes than this one."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1
