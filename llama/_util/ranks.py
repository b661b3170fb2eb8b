"""Which of torchrun's processes this one is. Works before a process group exists."""

import os

import torch.distributed as dist


def env_rank() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), from torchrun's environment variables; (0, 1, 0) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return 0, 1, 0
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return rank, world_size, local_rank


def is_main_process() -> bool:
    """Whether this process is rank 0, which prints for the user. Works before anything is initialized too."""
    return (dist.get_rank() if dist.is_initialized() else env_rank()[0]) == 0
