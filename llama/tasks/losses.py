"""How far logits are from labels, in float32: over a vocabulary that ranks divide, over classes, over positions.

Knows tensors and the model-parallel group; knows no model.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import LlamaError

IGNORED = -100  # the label of what isn't learnt, as torch's cross_entropy has it
CHUNK_BYTES = 1 << 27  # of float32 logits that are there at a time


def language_loss(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens after each position: labels (B, T) are the tokens themselves, shifted here.

    h: (B, T, dim). weight: (vocab_size / ranks, dim), this rank's rows of the output layer. Positions whose next
    label is IGNORED aren't computed. No rank holds the logits of more than some of the positions, nor of another rank's
    words; those of each chunk are computed again for the gradient. 0 / 0, nan, where nothing is to be learnt.
    Raises LlamaError for labels of another shape, or that are no words.
    """
    vocab_size = weight.shape[0] * get_model_parallel_world_size()
    targets = whole_numbers(labels, h.shape[:-1])[:, 1:].flatten()  # (B * (T - 1))
    places = (targets != IGNORED).nonzero().squeeze(-1)  # (N)
    targets = targets[places]
    check_classes(targets, vocab_size)
    h = copy_to_model_parallel_region(h[:, :-1].flatten(0, 1)[places])  # (N, dim)
    losses = [
        checkpoint(surprise, states, weight, wanted, use_reentrant=False)
        for states, wanted in chunks(h, targets, CHUNK_BYTES // (4 * weight.shape[0]))
    ]
    return torch.stack([h.new_zeros((), dtype=torch.float32), *losses]).sum() / len(targets)


def chunks(h: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(h.split(max(size, 1)), targets.split(max(size, 1)), strict=True)


def surprise(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log softmax(h weight^T)[target], where ranks divide the rows of weight: (N, dim), (N) -> ().

    Each rank adds up its own words' part; ranks exchange N numbers three times (arXiv:1909.08053, section 3).
    """
    logits = F.linear(h, weight).float()  # (N, vocab_size / ranks)
    top = logits.detach().amax(dim=-1)  # (N)
    if get_model_parallel_world_size() > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=get_model_parallel_group())
    total = reduce_from_model_parallel_region((logits - top[:, None]).exp().sum(dim=-1))  # (N)
    own = targets - get_model_parallel_rank() * weight.shape[0]
    is_here = (own >= 0) & (own < weight.shape[0])
    chosen = logits.gather(-1, own.where(is_here, 0)[:, None]).squeeze(-1).where(is_here, 0)
    return (total.log() + top - reduce_from_model_parallel_region(chosen)).sum()


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: logits (..., classes), labels (...) of which those that are IGNORED don't count.

    nan where none counts. Raises LlamaError for labels of another shape, or that are no classes.
    """
    labels = whole_numbers(labels, logits.shape[:-1]).flatten()
    check_classes(labels[labels != IGNORED], logits.shape[-1])
    return F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=IGNORED)


def whole_numbers(labels: Tensor, shape: Sequence[int], name: str = "labels") -> Tensor:
    """The labels, int64. Raises LlamaError unless they are whole numbers of this shape."""
    if labels.shape != shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise LlamaError(
            f"{name} are {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers of shape {tuple(shape)}"
        )
    return labels.long()


def check_classes(labels: Tensor, count: int) -> None:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < count):
        bad = labels[(labels < 0) | (labels >= count)][0]
        raise LlamaError(f"a label is {int(bad)}, expected {IGNORED}, or a whole number in [0, {count})")
