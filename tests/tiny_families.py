"""Tiny random models of transformers in the forms of published families, for tests that compare with them."""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SWITCH = 8  # the length past which scaled rotary embeddings may change: SHORT and the first prompt end below it


def rope(kind: str, theta: float = 100.0, **keys: Any) -> dict[str, Any]:
    """With this base, all that distinguishes the types of scaling happens within a short text."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}, "max_position_embeddings": SWITCH}


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def make_model(family: str, config: dict[str, Any], seed: int) -> PreTrainedModel:
    """Random weights, large enough for attention to have preferences; norms and biases are random too.

    Heads have 16 numbers unless `config` says otherwise: the fast form has a kernel for some sizes only.
    """
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    made = AutoConfig.for_model(family, **{**sizes, **copy.deepcopy(config)})
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 2:
            noise *= 1 if "embed" in name else 2 / weight.shape[1] ** 0.5
        weight.data.copy_(noise if weight.ndim == 2 or name.endswith("bias") else 1 + 0.3 * noise)
    return model
