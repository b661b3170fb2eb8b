"""One forward pass of the engine: hidden states, and logits of those that are wanted.

A model whose own `forward` was hooked or replaced is called as a whole. Knows no sequence, no cache's book and no text.
"""

import torch
from torch import Tensor

from .._util.slots import UNTOLD_SLOTS
from ..errors import LlamaError
from ..kv_cache import StartPos
from ..model import Transformer

PLAIN_FORWARD = Transformer.forward


def is_intercepted(model: Transformer) -> bool:
    """Whether the forward of the whole model was hooked, or replaced in the object, its class or a subclass."""
    hooked = bool(model._forward_hooks or model._forward_pre_hooks)
    return hooked or "forward" in vars(model) or type(model).forward is not PLAIN_FORWARD


def read_cast(device: str) -> torch.dtype | None:
    """The dtype of `torch.autocast` in this thread; None: it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def find_cache_dtype(model: Transformer) -> torch.dtype:
    """The dtype of the keys and values that a pass computes now."""
    return read_cast(model.device.type) or model.dtype


def is_dynamic(model: Transformer) -> bool:
    """Whether the angles of a text depend on its length, so that what is cached of one text is of no use to another."""
    scaling = model.params.rope_scaling
    return scaling is not None and scaling.type == "dynamic"


def compute_states(
    model: Transformer,
    tokens: Tensor,
    start_pos: StartPos | None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """What `compute_logits` makes logits of: hidden states (B, T, dim), or the logits of an intercepted forward.

    The arguments are those of `Transformer.hidden_states`. Raises LlamaError where an intercepted forward can't be
    given the rows' lengths, or doesn't return logits.
    """
    if not is_intercepted(model):
        return model.hidden_states(tokens, start_pos, lengths, slots)
    if lengths is not None and is_dynamic(model) and (lengths < tokens.shape[1]).any():
        raise LlamaError(
            "the model's forward was hooked or replaced, and can't be told the lengths of padded rows, which 'dynamic' "
            "rotary scaling needs: pass one prompt a call, without proposals, or hook the layers instead"
        )
    token = UNTOLD_SLOTS.set(slots)
    try:
        logits = model(tokens, start_pos)  # (B, T, vocab_size)
    finally:
        UNTOLD_SLOTS.reset(token)
    expected = (*tokens.shape, model.vocab_size)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        was = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise LlamaError(f"the model's hooked or replaced forward returned {was}, expected logits of shape {expected}")
    return logits.float()


def compute_logits(model: Transformer, states: Tensor) -> Tensor:
    """What `compute_states` returned, or a selection of it (..., dim): float32 (..., vocab_size).

    Call it before a caller's code runs, which may hook the model.
    """
    return states if is_intercepted(model) else model.logits(states)
