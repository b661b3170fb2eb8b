"""A config.json that leaves keys out: each has the value that transformers gives it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.checkpoints.hf_config import read_config
from llama.model import ModelArgs
from llama.rotary import frequencies, grow_theta, powers

SIZES = {"hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 40, "num_attention_heads": 64}
SIZES |= {"vocab_size": 300}


def read_both(folder: Path, family: str, **values: Any) -> tuple[ModelArgs, Any]:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": family, **SIZES, **values}))
    return read_config(path).args, AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("windowed", [False, True])
def test_values_are_transformers(tmp_path: Path, family: str, windowed: bool) -> None:
    args, theirs = read_both(tmp_path, family, **{"use_sliding_window": True} if windowed else {})
    assert args.norm_eps == theirs.rms_norm_eps
    assert args.rope_theta == theirs.rope_parameters["rope_theta"] and args.rope_scaling is None
    assert args.kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert args.head_size == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert args.tied_embeddings == theirs.tie_word_embeddings
    types = getattr(theirs, "layer_types", None)
    if types is None:
        assert args.sliding_window == getattr(theirs, "sliding_window", None) and args.sliding_layers is None
        return
    sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    assert args.sliding_window == (theirs.sliding_window if sliding else None)
    assert (args.sliding_layers or ()) == sliding


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 512}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # -> rope_parameters, other keys
    "yarn without a factor": ({**YARN, "factor": None}, {"max_position_embeddings": 2048}),
    "yarn with mscale": (
        {**YARN, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {"max_position_embeddings": 4096},
    ),
    "yarn, the length outside": ({**YARN, "factor": 4.0}, {"original_max_position_embeddings": 1024}),
    "dynamic, with an original length": (
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256},
        {"max_position_embeddings": 1024},
    ),
    "llama3, the length outside": (
        {
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 1024},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_stretchings_are_transformers(tmp_path: Path, name: str) -> None:
    rope, others = SCALINGS[name]
    args, theirs = read_both(tmp_path, "llama", rope_parameters=rope, **others)
    scaling = args.rope_scaling
    assert scaling is not None
    if scaling.type == "dynamic":
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, device="cpu", seq_len=1500)
        found = powers(32, grow_theta(32, args.rope_theta, scaling, torch.tensor(1500)))
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        return
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.type](theirs, device="cpu")
    found, attention = frequencies(args.head_size, args.rope_theta, scaling)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert attention == pytest.approx(factor)
