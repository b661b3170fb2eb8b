"""Shards of Meta's that repeat the embedding as the output layer: it is one matrix only if all shards repeat it."""

from pathlib import Path

import pytest
import torch
from tiny import ARGS, split_checkpoint, write_checkpoint

from llama.checkpoints.loader import open_checkpoint, survey


@pytest.mark.parametrize("differing", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("row", [0, 7, -1])
def test_one_matrix_or_two(tmp_path: Path, differing: tuple[int, ...], row: int) -> None:
    directory = split_checkpoint(write_checkpoint(tmp_path / "whole", ARGS), tmp_path / "shards", 2)
    for rank in range(2):
        path = directory / f"consolidated.{rank:02d}.pth"
        tensors = torch.load(path, weights_only=True)
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
        if rank in differing:
            tensors["output.weight"][row, 3] += 1
        torch.save(tensors, path)
    assert open_checkpoint(directory).sizes.tied_embeddings == (not differing)
    if row == 0:  # which a sample has
        assert survey(directory).sizes.tied_embeddings == (not differing)
