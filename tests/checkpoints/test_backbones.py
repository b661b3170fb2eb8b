"""Networks that were saved without an output layer, and without the prefix of their tensors' names: embedders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from against_transformers import TOKENS, assert_same_logits, edit_config, edit_tensors, load, write_model
from conftest import assert_close
from safetensors.torch import load_file, save_file
from tiny import write_hf_checkpoint
from torch import Tensor
from transformers import AutoModel

from llama import Llama, LlamaError, TaskModel
from llama.checkpoints.convert import convert
from llama.checkpoints.huggingface import INDEX, SINGLE
from llama.checkpoints.inspect import inspect
from llama.checkpoints.loader import open_checkpoint, survey
from llama.parallel import Place

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As AutoModel saves them."""
    return {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}


def write_backbone(directory: Path, family: str = "llama", tied: bool = False) -> Path:
    write_model(directory, family, tie_word_embeddings=tied, head_dim=16)
    stem = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return edit_tensors(edit_config(directory, architectures=[f"{stem}Model"]), strip)


@torch.no_grad()
def assert_same_states(directory: Path, place: Place, model: Path | None = None) -> None:
    """model: what transformers reads, if that is elsewhere."""
    theirs = AutoModel.from_pretrained(model or directory, dtype=torch.float32)
    expected = theirs(TOKENS, use_cache=False).last_hidden_state
    assert_close(load(directory, place)[1].hidden_states(TOKENS), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(family: str, tied: bool, tmp_path: Path, place: Place) -> None:
    write_backbone(tmp_path, family, tied)
    assert_same_states(tmp_path, place)
    if tied:  # the embedding is the output layer, so there is one
        assert_same_logits(tmp_path, place)


@pytest.mark.parametrize("form", ["all bare", "some bare", "prefix, no output layer", "bare with output layer"])
def test_forms_of_names(form: str, tmp_path: Path, place: Place) -> None:
    write_model(tmp_path, "llama")
    if form == "bare with output layer":
        edit_tensors(tmp_path, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
        return assert_same_logits(tmp_path, place)
    if form == "some bare":
        edit_tensors(tmp_path, lambda ts: {n.removeprefix("model.") if "mlp" in n else n: t for n, t in ts.items()})
        return assert_same_logits(tmp_path, place)
    if form == "prefix, no output layer":
        edit_config(tmp_path, architectures=["LlamaModel"])
        edit_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    else:
        edit_tensors(tmp_path, strip)
    assert_same_states(tmp_path, place)


def test_shards_of_bare_names(tmp_path: Path, place: Place) -> None:
    whole = write_backbone(tmp_path / "whole")
    shutil.copy(whole / "config.json", tmp_path)
    tensors = load_file(whole / SINGLE)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same_states(tmp_path, place)
    (tmp_path / INDEX).unlink()  # transformers needs it
    assert_same_states(tmp_path, place, whole)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A backbone with a tokenizer."""
    return edit_tensors(edit_config(write_hf_checkpoint(tmp_path), architectures=["LlamaModel"]), strip)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_embeds_and_refuses_to_generate(backbone: Path, quantization: str | None) -> None:
    llama = Llama.build(backbone, device="cpu", dtype="float32", quantization=quantization)
    assert llama.embed(["hello", "a sea"]).shape == (2, 64)
    for call in (
        lambda: llama.text_completion(["hello"], max_gen_len=2),
        lambda: llama.complete([[5, 6]], temperature=0, num_beams=2),
        lambda: llama.score(["hello there"]),
        lambda: llama.model(torch.tensor([[5, 6]])),
        lambda: llama.model(torch.tensor([[5, 6]]), 0),
        lambda: llama.model.logits(torch.zeros(1, 64)),
    ):
        with pytest.raises(LlamaError, match="has no output layer, so it can neither generate nor score"):
            call()


def test_other_tasks(backbone: Path) -> None:
    model = TaskModel.build(backbone, device="cpu", dtype="float32", task="classify", labels=["a", "b"])
    assert model.classify(["hello"])[0][0].label in ("a", "b")
    with pytest.raises(LlamaError, match="has no output layer: it was saved to embed texts"):
        TaskModel.build(backbone, device="cpu")


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_is_written_as_what_it_is(backbone: Path, quantization: str | None, tmp_path: Path, place: Place) -> None:
    convert(backbone, tmp_path / "again", "hf", quantization=quantization)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaModel"], False)
    assert not open_checkpoint(tmp_path / "again").has_output
    if quantization is None:
        assert_same_states(tmp_path / "again", place)
    with pytest.raises(LlamaError, match="has no output layer, for which Meta's layout has no place"):
        convert(backbone, tmp_path / "meta2", "meta")


def test_inspect_tells(backbone: Path) -> None:
    report = inspect(backbone)
    assert report.ok and report.sizes is not None and not report.sizes["tied_embeddings"]
    assert "no output layer" in report.as_text()


def test_an_output_layer_that_is_missing_is_missed(tmp_path: Path) -> None:
    """A class that has one, and names as it writes them: the file is damaged."""
    write_model(tmp_path, "llama")
    edit_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(LlamaError, match=r"missing lm_head\.weight"):
        open_checkpoint(tmp_path)


def test_misfits_have_the_names_in_the_files(tmp_path: Path) -> None:
    write_backbone(tmp_path)
    edit_tensors(tmp_path, lambda tensors: {**tensors, "norm.weight": torch.ones(3), "layers.7.more": torch.ones(1)})
    assert survey(tmp_path).misfits == ["surplus layers.7.more", "norm.weight of shape (3,), expected (128,)"]
