"""The attention weights of every head, computed by torch's plain operations, slowly.

Knows the network; knows no files and no generation. The model stays as it is: what runs is a view,
other layers with its parameters and caches.
"""

from typing import TypeVar, cast

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn

from ..kv_cache import StartPos
from ..model import Attention, Transformer, repeat_kv

M = TypeVar("M", bound=nn.Module)


class EagerAttention(Attention):
    """Attention as the papers write it."""

    weights: Tensor  # of the last forward, float32 (B, H, T, S)

    def weigh(self, xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.weigh`: (B, T, H, D)."""
        xk, xv = (repeat_kv(x, self.n_rep) for x in (xk, xv))  # (B, S, H, D)
        scores = torch.einsum("bthd,bshd->bhts", xq, xk).float() / self.head_dim**0.5  # (B, H, T, S)
        if mask is None and xq.shape[1] > 1:  # tokens from position 0 on, each of which sees those before it
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()  # (T, S = T)
        if mask is not None:
            scores = scores.where(mask, -torch.inf)
        self.weights = torch.softmax(scores, dim=-1)
        return torch.einsum("bhts,bshd->bthd", self.weights.type_as(xv), xv)


def attention_weights(
    model: Transformer, tokens: Tensor, start_pos: StartPos | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and the attention weights of each layer.

    tokens, start_pos, gradients, errors and the use of the cache are those of `Transformer.forward`.
    Returns float32 (B, T, vocab_size), and for each layer float32 (B, n_heads, T, S): softmax(Q K^T / sqrt(D)) of
    arXiv:1706.03762, of all ranks' heads, on every rank. S: T, or with `start_pos` the positions of the longest row.
    The weights of a query sum to 1, and are 0 at keys that it doesn't see.
    """
    view = make_eager_view(model)
    logits = view(tokens, start_pos)
    layers = [cast(EagerAttention, layer.attention) for layer in view.layers]
    with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
        return logits, tuple(gather_heads(layer.weights) for layer in layers)


def make_eager_view(model: Transformer) -> Transformer:
    """The model with eager attention, and without its fast form. Parameters, caches and hooks are the model's."""
    layers = nn.ModuleList()
    for layer in model.layers:
        attention = make_view(cast(Attention, layer.attention), EagerAttention)
        layers.append(make_view(layer, type(layer), attention=attention))
    view = make_view(model, Transformer, layers=layers)
    view.fast = None
    return view


def make_view(module: nn.Module, kind: type[M], **parts: nn.Module) -> M:
    """A module of this class with the attributes, parameters and buffers of another, and these parts."""
    view = kind.__new__(kind)
    vars(view).update(vars(module))
    view._modules = {**module._modules, **parts}
    return view


def gather_heads(weights: Tensor) -> Tensor:
    """All ranks' heads, (B, n_heads, T, S), from this rank's, (B, H, T, S)."""
    return gather_from_model_parallel_region(weights.movedim(1, -1).contiguous()).movedim(-1, 1)
