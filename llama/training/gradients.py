"""Gradients of a model that ranks divide: what ranks hold in common, what data-parallel copies add, norms, recomputing.

Knows names and groups; knows no loss and no optimizer.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_data_parallel_group,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints.schema import shared_over, split_dim
from ..model import ModelArgs, Transformer

# Whose gradients are each rank's own heads' share, though the parameter is the same on every rank.
OF_HEADS = ("q_norm.weight", "k_norm.weight")


def with_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter, its gradient) of what is trained, in an order that all ranks share."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            yield name, parameter, parameter.grad


@torch.no_grad()
def complete(module: nn.Module, args: ModelArgs) -> None:
    """Make each gradient the whole one of its parameter: summed over the ranks that share a key/value head, over all
    heads where a norm is theirs, and over the data-parallel copies of the model."""
    ranks = get_model_parallel_world_size()
    for name, _, grad in with_gradients(module):
        if ranks > 1 and name.endswith(OF_HEADS):
            dist.all_reduce(grad, group=get_model_parallel_group())
        elif (shared := shared_over(name, args, ranks)) > 1:
            slots = grad.new_zeros(ranks // shared, *grad.shape)  # one for each head: neighbours have the same
            slots[get_model_parallel_rank() // shared] = grad
            dist.all_reduce(slots, group=get_model_parallel_group())
            grad.copy_(slots[get_model_parallel_rank() // shared])
        over_copies(grad)


def over_copies(x: Tensor) -> Tensor:
    """Make it the sum of those of all data-parallel copies."""
    if dist.get_world_size(get_data_parallel_group()) > 1:
        dist.all_reduce(x, group=get_data_parallel_group())
    return x


@torch.no_grad()
def norm(module: nn.Module, args: ModelArgs) -> Tensor:
    """The 2-norm of all gradients of the whole model, each part counted once: float32 (), alike on every rank."""
    device = next(module.parameters()).device
    divided, whole = torch.zeros((), device=device), torch.zeros((), device=device)
    for name, _, grad in with_gradients(module):
        square = grad.float().pow(2).sum()
        if split_dim(name) is None:
            whole += square
        else:
            divided += square / shared_over(name, args, get_model_parallel_world_size())
    if get_model_parallel_world_size() > 1:
        dist.all_reduce(divided, group=get_model_parallel_group())
    return (divided + whole).sqrt()


@torch.no_grad()
def clip(module: nn.Module, args: ModelArgs, most: float) -> Tensor:
    """Scale gradients so that their norm is at most this (arXiv:1211.5063); returns what it was."""
    total = norm(module, args)
    scale = (most / (total + 1e-6)).clamp(max=1)
    for _, _, grad in with_gradients(module):
        grad.mul_(scale)
    return total


def checkpoint_layers(model: Transformer) -> None:
    """Keep of each layer what goes into it only, and compute the rest again for the gradient (arXiv:1604.06174)."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
