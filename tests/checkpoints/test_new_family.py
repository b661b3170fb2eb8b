"""A family from outside of the package, with other names, biases and another rotary base, is read and written back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARGS, write_checkpoint

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.families import FAMILIES, Family

KEYS = {"hidden_size": "n_embd", "rope_theta": "base"}
NAMES = {"layers": "h", "attention.wq": "attn.query"}
BASE = {"rope_theta": 777.0}
MINE = Family("mine", "Mine", "My own", keys=KEYS, tensor_names=NAMES, defaults=BASE, qkv_bias=True, wo_bias=True)


def test_a_new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, theirs, mine, back = paths = [tmp_path / name for name in ("meta", "theirs", "mine", "back")]
    convert(write_checkpoint(tmp_path / "plain", replace(ARGS, qkv_bias=True, wo_bias=True, **BASE)), theirs, "hf")
    tensors = {n: t if t.any() else torch.rand_like(t) for n, t in load_file(theirs / "model.safetensors").items()}
    save_file(tensors, theirs / "model.safetensors")
    own = {n.replace(".layers.", ".h.").replace("self_attn.q_proj", "attn.query"): t for n, t in tensors.items()}
    mine.mkdir()
    save_file(own, mine / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((theirs / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], **{KEYS[k]: config.pop(k) for k in KEYS}}
    (mine / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "base"}))
    monkeypatch.setitem(FAMILIES, "mine", MINE)
    convert(mine, meta, "meta", mp_size=2)
    convert(meta, back, "hf")
    assert (back / "model.safetensors").read_bytes() == (mine / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == config
    logits = [Llama.build(path, theirs / "tokenizer.json", device="cpu").model(torch.arange(9)[None]) for path in paths]
    assert all(torch.equal(logits[0], other) for other in logits)
