"""Stretched rotary embeddings at the edges of each kind: bounds outside of the head or equal, lengths at the limit."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.rotary import RopeScaling, compute_dynamic_freqs_cis, frequencies

YARNS: dict[str, dict[str, Any]] = {
    "bounds that aren't rounded": {"original_max_position_embeddings": 4096, "truncate": False},
    "slow pairs past the head's half": {"original_max_position_embeddings": 4096, "theta": 100.0},
    "slow pairs past the head": {"original_max_position_embeddings": 10**6, "theta": 100.0},
    "fast pairs past the head": {"original_max_position_embeddings": 10**8, "theta": 50.0},
    "no pair turns": {"original_max_position_embeddings": 4},
    "no pair turns once": {"original_max_position_embeddings": 6},
    "both bounds at the first pair": {"original_max_position_embeddings": 5, "beta_slow": 0.9, "beta_fast": 1.0},
    "equal bounds": {"original_max_position_embeddings": 4096, "beta_slow": 7.9999, "beta_fast": 8.0},
    "equal bounds, not rounded": {"original_max_position_embeddings": 4, "beta_slow": 2.0, "truncate": False},
}


@pytest.mark.parametrize("name", YARNS)
@pytest.mark.parametrize("dim", [8, 64])
def test_yarn(name: str, dim: int) -> None:
    fields = {"factor": 4.0, **YARNS[name]}
    theta = fields.pop("theta", 10000.0)
    rope = {"rope_type": "yarn", "rope_theta": theta, **fields}
    theirs = LlamaConfig(hidden_size=dim * 4, num_attention_heads=4, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    found, attention = frequencies(dim, theta, RopeScaling("yarn", **fields))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert attention == pytest.approx(factor)


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 40])
def test_dynamic_grows_from_the_first_token_past_the_original_length(dim: int, length: int) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    theirs = LlamaConfig(hidden_size=dim * 4, num_attention_heads=4, max_position_embeddings=16, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, device="cpu", seq_len=length)
    angles = torch.outer(torch.arange(length).float(), expected)  # (T, dim / 2)
    scaling = RopeScaling("dynamic", 3.0, 16)
    found = compute_dynamic_freqs_cis(dim, torch.arange(length), None, 10000.0, scaling)
    torch.testing.assert_close(found, torch.polar(torch.ones_like(angles), angles), rtol=1e-4, atol=1e-5)
    # The same row with three positions of padding after it, whose length is told.
    padded = compute_dynamic_freqs_cis(dim, torch.arange(length + 3)[None], torch.tensor([length]), 10000.0, scaling)
    torch.testing.assert_close(padded[0, :length], found, rtol=1e-4, atol=1e-5)
