"""Stretched rotary embeddings against transformers' functions, in the network too; and Meta's keys for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, assert_close, to_meta
from tiny import ARGS, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama import Llama, LlamaError, Transformer
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.meta import read_params, save_checkpoint
from llama.model import precompute_freqs_cis
from llama.parallel import Place
from llama.rotary import RopeScaling, frequencies

SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "Llama 3.1": RopeScaling("llama3", 8.0),
    "Llama 3.2": RopeScaling("llama3", 32.0),
    "llama3 of other bounds": RopeScaling("llama3", 3.5, 64, low_freq_factor=0.5, high_freq_factor=9.0),
    "yarn": RopeScaling("yarn", 4.0, 4096),
    "yarn of other bounds": RopeScaling("yarn", 2.5, 32, beta_slow=0.7, beta_fast=20.0),
    "yarn with its own attention": RopeScaling("yarn", 16.0, 2048, attention_factor=0.7),
}
USED = {
    "linear": [],
    "llama3": ["original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
    "yarn": ["original_max_position_embeddings", "beta_slow", "beta_fast", "attention_factor"],
}


def config(scaling: RopeScaling, theta: float, **sizes: int) -> LlamaConfig:
    named = {name: getattr(scaling, name) for name in USED[scaling.type] if getattr(scaling, name) is not None}
    rope = {"rope_type": scaling.type, "rope_theta": theta, "factor": scaling.factor, **named}
    return LlamaConfig(**sizes, max_position_embeddings=131072, rope_parameters=rope)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(128, 500000.0), (64, 10000.0), (8, 1e6)])
def test_frequencies_equal_transformers(name: str, dim: int, theta: float) -> None:
    theirs = config(SCALINGS[name], theta, hidden_size=dim * 4, num_attention_heads=4)
    expected, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name].type](theirs, device="cpu")
    found, attention = frequencies(dim, theta, SCALINGS[name])
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert attention == pytest.approx(factor)
    plain, _ = frequencies(dim, theta)
    assert not torch.equal(found, plain), "something was stretched"


@pytest.mark.parametrize("name", ["linear", "llama3 of other bounds", "yarn of other bounds"])
def test_logits_equal_transformers(place: Place, name: str) -> None:
    args = replace(CASES["grouped"], rope_theta=100, rope_scaling=SCALINGS[name], max_seq_len=80)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    theirs = LlamaForCausalLM(
        config(SCALINGS[name], 100.0, **sizes, vocab_size=97, intermediate_size=args.hidden_dim)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in theirs.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    theirs.config.rms_norm_eps = args.norm_eps
    ours = Transformer(replace(args, norm_eps=1e-6))
    ours.load_state_dict(to_meta(theirs.state_dict(), args))
    tokens = torch.randint(97, (2, 80), generator=generator)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, use_cache=False).logits
    assert_close(ours(tokens), expected)
    assert_close(torch.cat([ours(tokens[:, :70], 0), ours(tokens[:, 70:], 70)], dim=1), expected)


def test_the_table_has_the_attention_factor_as_its_length() -> None:
    table = precompute_freqs_cis(64, 10, 10000.0, SCALINGS["yarn with its own attention"])
    assert table.dtype == torch.complex64
    torch.testing.assert_close(table.abs(), torch.full((10, 32), 0.7))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"use_scaled_rope": False}, None),
        ({"use_scaled_rope": True}, RopeScaling("llama3", 8)),
        ({"use_scaled_rope": True, "rope_scaling_factor": 16}, RopeScaling("llama3", 16)),
        ({"use_scaled_rope": True, "dim": 2048}, RopeScaling("llama3", 32)),
        ({"use_scaled_rope": True, "dim": 3072}, RopeScaling("llama3", 32)),
        ({"use_scaled_rope": True, "dim": 2048, "rope_scaling_factor": 4}, RopeScaling("llama3", 4)),
    ],
)
def test_metas_keys(tmp_path: Path, keys: dict, expected: RopeScaling | None) -> None:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 512}
    (tmp_path / "params.json").write_text(json.dumps({**sizes, **keys}))
    assert read_params(tmp_path / "params.json")["rope_scaling"] == expected


def test_a_scaled_checkpoint_comes_back_and_runs(tmp_path: Path) -> None:
    scaled = replace(ARGS, rope_scaling=SCALINGS["yarn of other bounds"])
    write_checkpoint(tmp_path / "scaled", scaled)
    write_checkpoint(tmp_path / "plain")
    assert open_checkpoint(tmp_path / "scaled").sizes.rope_scaling == scaled.rope_scaling
    texts = [
        Llama.build(tmp_path / name, device="cpu", dtype="float32").text_completion(["hello"], 0, max_gen_len=30)
        for name in ("scaled", "plain")
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes', expected true or false"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, "rope scaling has factor 0.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope scaling 'longrope' is not known: expected linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4.0}},
            "expected the first below the second",
        ),
    ],
)
def test_what_cannot_be_is_refused(place: Place, tmp_path: Path, keys: dict, message: str) -> None:
    save_checkpoint(tmp_path, ARGS, {})
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, **keys}))
    with pytest.raises(LlamaError, match=message):
        open_checkpoint(tmp_path)
