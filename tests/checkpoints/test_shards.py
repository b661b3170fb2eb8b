"""Which files of a directory are the model, where an index is missing, stale, or beside a whole file."""

import json
from pathlib import Path

import pytest
import torch
from against_transformers import assert_same_logits, logits_of_transformers, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import LlamaError
from llama.checkpoints.huggingface import INDEX, SINGLE
from llama.checkpoints.loader import open_checkpoint, survey
from llama.parallel import Place


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, "llama")


def split(directory: Path, count: int, stem: str = "model", tensors: dict[str, Tensor] | None = None) -> dict[str, str]:
    """Write shards beside SINGLE. Returns the index's places."""
    tensors = tensors or load_file(directory / SINGLE)
    places = {name: f"{stem}-{1 + i % count:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, directory / file, {"format": "pt"})
    return places


def refusal(directory: Path) -> str:
    with pytest.raises(LlamaError) as error:
        open_checkpoint(directory)
    return str(error.value)


@pytest.mark.parametrize(("count", "stem"), [(2, "model"), (11, "model"), (3, "weights"), (1, "model")])
def test_shards_without_an_index(directory: Path, count: int, stem: str, place: Place) -> None:
    expected = logits_of_transformers(directory)
    split(directory, count, stem)
    (directory / SINGLE).unlink()
    assert_same_logits(directory, place, expected)


def test_a_shard_that_is_missing(directory: Path) -> None:
    split(directory, 3)
    (directory / SINGLE).unlink()
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing: 2 of 3 shards are here, and no model" in refusal(directory)
    assert len(survey(directory).files) == 2


def test_a_shard_too_many(directory: Path) -> None:
    split(directory, 2)
    (directory / SINGLE).rename(directory / "model-00003-of-00002.safetensors")
    assert "model-00003-of-00002.safetensors is one too many" in refusal(directory)


def test_two_sets_of_shards(directory: Path, place: Place) -> None:
    expected = logits_of_transformers(directory)
    tensors = load_file(directory / SINGLE)
    split(directory, 2, "b")
    split(directory, 3, "a")
    (directory / SINGLE).unlink()
    assert "has a-*-of-00003.safetensors, b-*-of-00002.safetensors, and no model" in refusal(directory)
    split(directory, 2, "model", tensors)  # the usual name is the model's
    assert_same_logits(directory, place, expected)
    split(directory, 3, "model", tensors)
    assert "model-*-of-00002.safetensors, model-*-of-00003.safetensors" in refusal(directory)


@pytest.mark.parametrize("are_there", [False, True])
def test_a_whole_file_is_read_before_shards_as_in_transformers(
    directory: Path, are_there: bool, place: Place, capsys: pytest.CaptureFixture
) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(directory / SINGLE).items()}
    places = split(directory, 2, "model", tensors)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    if not are_there:
        for file in set(places.values()):
            (directory / file).unlink()
    assert_same_logits(directory, place)
    assert "model.safetensors is read, and not the files that model.safetensors.index" in capsys.readouterr().err


def test_other_files_are_not_the_model(directory: Path, place: Place) -> None:
    save_file({"x": torch.ones(1)}, directory / "consolidated.safetensors")
    save_file({"x": torch.ones(1)}, directory / "adapter_model.safetensors")
    assert_same_logits(directory, place)
    (directory / SINGLE).unlink()
    assert "model.safetensors is missing, and there is no" in refusal(directory)


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_links_to_nothing_are_told(directory: Path, name: str) -> None:
    (directory / name).rename(directory / "elsewhere")
    (directory / name).symlink_to("../blobs/0123")
    assert f"{name} is a link to ../blobs/0123, which isn't there" in refusal(directory)
