"""The loss of every word of a vocabulary as a target, on this rank."""

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size

from llama.parallel import initialize
from llama.tasks.losses import IGNORED, language_loss

WORDS, DIM = 12, 8


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (B, T, dim), the output layer (words, dim) and labels, in which each word is a target once."""
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(2, 8, DIM, generator=generator)
    labels = torch.full((2, 8), IGNORED)
    labels[0, 1:7], labels[1, 2:] = torch.arange(6), torch.arange(6, 12)
    return h, torch.randn(WORDS, DIM, generator=generator), labels


def compute() -> float:
    initialize(device="cpu", dtype=torch.float32)
    h, weight, labels = make()
    size, rank = WORDS // get_model_parallel_world_size(), get_model_parallel_rank()
    return float(language_loss(h, weight[rank * size : (rank + 1) * size], labels))
