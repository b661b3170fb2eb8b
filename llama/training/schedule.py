"""What each step of a training gets: its examples, its learning rate, its weight decay, its random numbers.

Pure in the seed and the step, so that a resumed run repeats what a run without a kill does. Knows no model.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .config import TrainingConfig


@lru_cache(maxsize=1)
def shuffle_indices(count: int, seed: int, epoch: int) -> list[int]:
    """The indices of all examples in this epoch's order."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def compute_learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to 0. step: from 0 on, of `steps` in all."""
    rising = max(round(config.warmup * steps), 1)
    return config.learning_rate * min((step + 1) / rising, (steps - step) / max(steps - rising + 1, 1))


def group_by_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: matrices decay, norms and biases don't."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def seed_generators(device: torch.device, seed: int, step: int, copy: int) -> Iterator[None]:
    """Seed torch's generators, which dropout draws from, for this step and data-parallel copy; restore them after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(f"{seed} {step} {copy}").getrandbits(63))
        yield
