"""Cross-entropy of logits and labels, in float32: over a vocabulary that ranks divide, over classes, over positions.

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

IGNORED = -100  # the label of what isn't learnt, as in torch's cross_entropy
CHUNK_BYTES = 1 << 27  # of float32 logits that are held at a time


def language_loss(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the token after each position: float32 (); nan if every label is IGNORED.

    h: (B, T, dim). weight: (vocab_size / ranks, dim), this rank's rows of the output layer. labels: (B, T), the tokens
    themselves, which are shifted here. A position whose next label is IGNORED isn't computed. Each rank holds the
    logits of its own words alone, for a chunk of positions at a time; the gradient computes them again.
    Raises LlamaError for labels of another shape, or outside of the vocabulary.
    """
    vocab_size = weight.shape[0] * get_model_parallel_world_size()
    targets = require_integers(labels, h.shape[:-1])[:, 1:].flatten()  # (B * (T - 1))
    learnt = (targets != IGNORED).nonzero().squeeze(-1)  # (N)
    targets = targets[learnt]
    check_classes(targets, vocab_size)
    h = copy_to_model_parallel_region(h[:, :-1].flatten(0, 1)[learnt])  # (N, dim)
    losses = [
        checkpoint(sum_cross_entropy, states, weight, tokens, use_reentrant=False)
        for states, tokens in split_chunks(h, targets, CHUNK_BYTES // (4 * weight.shape[0]))
    ]
    return torch.stack([h.new_zeros((), dtype=torch.float32), *losses]).sum() / len(targets)


def split_chunks(h: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(h.split(max(size, 1)), targets.split(max(size, 1)), strict=True)


def sum_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log softmax(h weight^T)[target]: h (N, dim), targets (N) -> ().

    weight: (vocab_size / ranks, dim), this rank's rows. Each rank sums over its own words; ranks exchange N numbers
    three times (arXiv:1909.08053, section 3).
    """
    logits = F.linear(h, weight).float()  # (N, vocab_size / ranks)
    top = logits.detach().amax(dim=-1)  # (N)
    if get_model_parallel_world_size() > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=get_model_parallel_group())
    total = reduce_from_model_parallel_region((logits - top[:, None]).exp().sum(dim=-1))  # (N)
    local_targets = targets - get_model_parallel_rank() * weight.shape[0]
    is_here = (local_targets >= 0) & (local_targets < weight.shape[0])
    target_logits = logits.gather(-1, local_targets.where(is_here, 0)[:, None]).squeeze(-1).where(is_here, 0)
    return (total.log() + top - reduce_from_model_parallel_region(target_logits)).sum()


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., classes) and labels (...), except IGNORED ones; nan if all are.

    Raises LlamaError for labels of another shape, or that are no classes.
    """
    labels = require_integers(labels, logits.shape[:-1]).flatten()
    check_classes(labels[labels != IGNORED], logits.shape[-1])
    return F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=IGNORED)


def require_integers(labels: Tensor, shape: Sequence[int], name: str = "labels") -> Tensor:
    """The labels, int64. Raises LlamaError unless they are integers of this shape."""
    if labels.shape != shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise LlamaError(
            f"{name} are {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers of shape {tuple(shape)}"
        )
    return labels.long()


def check_classes(labels: Tensor, count: int) -> None:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < count):
        bad = labels[(labels < 0) | (labels >= count)][0]
        raise LlamaError(f"a label is {int(bad)}, expected {IGNORED}, or a whole number in [0, {count})")
