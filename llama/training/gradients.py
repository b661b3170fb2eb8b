"""Gradients of a model that ranks divide: sums over ranks and data-parallel copies, norms, clipping, recomputation.

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

from ..checkpoints.schema import ranks_per_part, split_dim
from ..model import ModelArgs, Transformer

# Parameters that every rank has alike, but with gradients from its own heads alone.
OF_HEADS = ("q_norm.weight", "k_norm.weight")


def iterate_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name of a trained parameter, its gradient), in the same order on all ranks."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            yield name, parameter.grad


@torch.no_grad()
def sum_over_ranks(module: nn.Module, args: ModelArgs) -> None:
    """Sum every gradient over all ranks that have a share of it: an all-reduce.

    Those are the ranks that share a key/value head, all ranks for the norms of heads, and the data-parallel copies.
    """
    ranks = get_model_parallel_world_size()
    for name, grad in iterate_gradients(module):
        if ranks > 1 and name.endswith(OF_HEADS):
            dist.all_reduce(grad, group=get_model_parallel_group())
        elif (sharing := ranks_per_part(name, args, ranks)) > 1:
            head = get_model_parallel_rank() // sharing  # neighbouring ranks share a head
            by_head = grad.new_zeros(ranks // sharing, *grad.shape)
            by_head[head] = grad
            dist.all_reduce(by_head, group=get_model_parallel_group())
            grad.copy_(by_head[head])
        sum_over_copies(grad)


def sum_over_copies(x: Tensor) -> Tensor:
    """Sum x over all data-parallel copies of the model, in place."""
    if dist.get_world_size(get_data_parallel_group()) > 1:
        dist.all_reduce(x, group=get_data_parallel_group())
    return x


@torch.no_grad()
def compute_norm(module: nn.Module, args: ModelArgs) -> Tensor:
    """The 2-norm of all gradients of the whole model: float32 (), the same on every rank."""
    device = next(module.parameters()).device
    divided, whole = torch.zeros((), device=device), torch.zeros((), device=device)
    for name, grad in iterate_gradients(module):
        square = grad.float().pow(2).sum()
        if split_dim(name) is None:
            whole += square
        else:
            divided += square / ranks_per_part(name, args, get_model_parallel_world_size())
    if get_model_parallel_world_size() > 1:
        dist.all_reduce(divided, group=get_model_parallel_group())
    return (divided + whole).sqrt()


@torch.no_grad()
def clip(module: nn.Module, args: ModelArgs, most: float) -> Tensor:
    """Scale gradients so that their norm is at most `most` (arXiv:1211.5063). Returns the norm before that."""
    norm = compute_norm(module, args)
    scale = (most / (norm + 1e-6)).clamp(max=1)
    for _, grad in iterate_gradients(module):
        grad.mul_(scale)
    return norm


def checkpoint_layers(model: Transformer) -> None:
    """Keep only each layer's input, and compute the layer again for the gradient (arXiv:1604.06174)."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
