"""A family from outside of the package: other names, biases, another rotary base; read, and written back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARGS, write_checkpoint

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.families import FAMILIES, Family
from llama.checkpoints.loader import open_checkpoint
from llama.model import ModelArgs

KEYS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "rope_theta": "rotary_base"}
QKV = {f"attention.w{x}": f"attn.{x}" for x in "qkv"}
MINE = Family("mine", "Mine", "My own", keys=KEYS, defaults={"rope_theta": 777.0}, tensor_names=QKV, qkv_bias="bias")


def test_a_new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in Llama's files (which have all biases, here of zeros) and in the new family's."""
    theirs, mine, back = (tmp_path / name for name in ("llama", "mine", "back"))
    convert(write_checkpoint(tmp_path / "meta", ModelArgs(**{**vars(ARGS), **BIASES})), theirs, "hf")
    tensors = {n: torch.randn(t.shape) if is_mine(n) else t for n, t in load_file(theirs / "model.safetensors").items()}
    save_file(tensors, theirs / "model.safetensors")
    monkeypatch.setitem(FAMILIES, "mine", MINE)
    write_mine(theirs, mine, tensors)
    convert(mine, tmp_path / "mine in meta", "meta", mp_size=2)
    convert(tmp_path / "mine in meta", back, "hf")
