"""Small random models in Hugging Face's files, changed as a test likes, and what transformers computes with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file
from tiny_families import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama.checkpoints.checkpoint import Checkpoint
from llama.checkpoints.huggingface import SINGLE
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.model import Transformer
from llama.parallel import Place

TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(7))


def write_model(directory: Path, family: str, edits: dict[str, Any] | None = None, **config: Any) -> Path:
    """A model as transformers saves it, with its `config.json` edited afterwards."""
    make_model(family, config, seed=1).save_pretrained(directory)
    return edit_config(directory, **(edits or {}))


def edit_config(directory: Path, **edits: Any) -> Path:
    """Set keys of `config.json`; "drop" removes one."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **edits}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))
    return directory


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str = SINGLE) -> Path:
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / name).items()}
    save_file(edit(tensors), directory / name, metadata={"format": "pt"})
    return directory


def load(directory: Path, place: Place) -> tuple[Checkpoint, Transformer]:
    checkpoint = open_checkpoint(directory)
    args = replace(checkpoint.sizes, max_batch_size=2, max_seq_len=64)
    return checkpoint, load_model(checkpoint, args, place)


@torch.no_grad()
def logits_here(directory: Path, place: Place) -> Tensor:
    return load(directory, place)[1](TOKENS)


@torch.no_grad()
def logits_of_transformers(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    return model(input_ids=TOKENS, use_cache=False).logits


def assert_same_logits(directory: Path, place: Place, expected: Tensor | None = None) -> None:
    assert_close(logits_here(directory, place), logits_of_transformers(directory) if expected is None else expected)


def write_tokenizer_json(directory: Path) -> None:
    """`convert` copies it, and doesn't read it."""
    (directory / "tokenizer.json").write_text("{}")
