"""A format of checkpoints from outside of the package is found, loaded, inspected, and converted to and from."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, write_checkpoint
from torch import Tensor

import llama
from llama import Llama
from llama._util.files import read_json
from llama.checkpoints.checkpoint import Checkpoint, CheckpointFormat, Contents, Export
from llama.checkpoints.convert import convert
from llama.checkpoints.formats import FORMATS
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.schema import Stored, tensor_shapes
from llama.model import ModelArgs


def read(checkpoint: Checkpoint, thorough: bool) -> Contents:
    checkpoint.args = ModelArgs(**read_json(checkpoint.config, "sizes"))
    checkpoint.files = [checkpoint.directory / "weights.pt"]
    return [torch.load(checkpoint.files[0], mmap=True)]


def gather(checkpoint: Checkpoint, files: Contents, thorough: bool) -> tuple[dict[str, Stored], list[str]]:
    return {name: Stored(name, (tensor,)) for name, tensor in files[0].items()}, []


def write(export: Export, config: Mapping[str, Any], sizes: Mapping[str, int], directory: Path) -> None:
    tensors: dict[str, Tensor] = {name: export.checkpoint.part(name) for name in tensor_shapes(export.checkpoint.sizes)}
    torch.save(tensors, directory / "weights.pt")


PT = CheckpointFormat(
    name="pt",
    label="My own",
    config="sizes.json",
    example="weights.pt",
    patterns=("weights.pt",),
    written_patterns=("weights.pt",),
    tokenizers=("tokenizer.model",),
    holds_heads=False,
    holds_quantized=False,
    holds_shards=False,
    read=read,
    gather=gather,
    spell=lambda checkpoint, name: name,
    make_config=lambda export: asdict(export.checkpoint.sizes),
    write=write,
    largest_file=lambda size, mp_size: size,
)


def test_a_new_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "pt", PT)
    source = write_checkpoint(tmp_path / "meta")
    convert(source, tmp_path / "pt", "pt")
    convert(tmp_path / "pt", tmp_path / "back", "meta")
    report = llama.inspect(tmp_path / "pt")
    assert report.ok and report.format == "pt" and "format       My own\n" in report.as_text()
    assert open_checkpoint(tmp_path / "pt").format is PT
    answers = [
        Llama.build(directory, device="cpu", dtype="float32").text_completion(PROMPTS, temperature=0, max_gen_len=8)
        for directory in (source, tmp_path / "pt", tmp_path / "back")
    ]
    assert answers[0] == answers[1] == answers[2]
    convert(source, tmp_path / "pt", "meta", force=True)
    assert not (tmp_path / "pt" / "weights.pt").exists() and not (tmp_path / "pt" / "sizes.json").exists()
