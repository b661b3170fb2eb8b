"""Attention that shows where it looks: the weights of every head, computed by torch's plain operations, slowly.

Knows the network; knows no files and no generation. The model that is asked stays as it is: what runs is a view of its
layers, matrices and caches.
"""

import copy
from typing import TypeVar, cast

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn

from ..model import Attention, StartPos, Transformer, repeat_kv

M = TypeVar("M", bound=nn.Module)


class EagerAttention(Attention):
    """Attention as the papers write it. `weights`: those of the last forward, float32 (B, H, T, S)."""

    weights: Tensor

    def look(self, xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.look`: (B, T, H, D)."""
        xk, xv = (repeat_kv(x, self.n_rep) for x in (xk, xv))  # (B, S, H, D)
        scores = torch.einsum("bthd,bshd->bhts", xq, xk).float() / self.head_dim**0.5  # (B, H, T, S)
        if mask is None and xq.shape[1] > 1:  # tokens from position 0 on, which look back
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()  # (T, S = T)
        if mask is not None:
            scores = scores.where(mask, -torch.inf)
        self.weights = torch.softmax(scores, dim=-1)
        return torch.einsum("bhts,bshd->bthd", self.weights.type_as(xv), xv)


def attention_weights(
    model: Transformer, tokens: Tensor, start_pos: StartPos | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and how much each query looks at each position in each layer.

    tokens, start_pos, gradients and errors are those of `Transformer.forward`, and so is what becomes of the cache.
    Returns (float32 (B, T, vocab_size), n_layers of float32 (B, n_heads, T, S)): softmax(Q K^T / sqrt(D)) of
    arXiv:1706.03762, of all ranks' heads, on every rank. S: T, or with `start_pos` as many positions as the row that
    stands furthest has; each row of weights sums to 1, and is 0 where a query may not look.
    """
    view = eager_view(model)
    logits = view(tokens, start_pos)
    layers = [cast(EagerAttention, layer.attention) for layer in view.layers]
    with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
        return logits, tuple(gathered_heads(layer.weights) for layer in layers)


def eager_view(model: Transformer) -> Transformer:
    """The model with eager attention, which shares all else with it: parameters, caches, and hooks."""
    layers = nn.ModuleList()
    for layer in model.layers:
        attention = seen_as(cast(Attention, layer.attention), EagerAttention)
        layers.append(seen_as(layer, type(layer), attention=attention))
    view = seen_as(model, Transformer, layers=layers)  # whose masks are those of a model without kernels
    vars(view).pop("run", None)  # nor does it take recorded steps
    return view


def seen_as(module: nn.Module, kind: type[M], **parts: nn.Module) -> M:
    """Another module with the same parameters and buffers, of another class and with other parts."""
    view = copy.copy(module)
    view.__class__ = kind
    view._modules = {**module._modules, **parts}
    return cast(M, view)


def gathered_heads(weights: Tensor) -> Tensor:
    """All ranks' heads, (B, n_heads, T, S), from this rank's, (B, H, T, S)."""
    return gather_from_model_parallel_region(weights.movedim(1, -1).contiguous()).movedim(-1, 1)
