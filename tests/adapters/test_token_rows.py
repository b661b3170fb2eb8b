"""Rows of tokens that an adapter replaces, at the edges of the blocks that are read."""

import pytest
import torch

from llama.adapters.merging import replace_rows
from llama.checkpoints.schema import Stored


@pytest.mark.parametrize("step", [1, 3, 4, 12])
def test_every_edge(step: int) -> None:
    whole = torch.arange(48.0).view(12, 4)
    tokens, values = [0, 2, 3, 8, 11], -torch.arange(20.0).view(5, 4) - 1
    expected = whole.clone()
    expected[tokens] = values
    rows = replace_rows(lambda start, stop: whole[start:stop], tokens, Stored("tokens", (values,)))
    assert torch.equal(torch.cat([rows(i, min(i + step, 12)) for i in range(0, 12, step)]), expected)
    assert torch.equal(whole, torch.arange(48.0).view(12, 4)), "the base is as it was"
