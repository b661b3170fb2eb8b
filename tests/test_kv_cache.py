"""What a query sees through a sliding window, at the very position where the window first leaves a token behind."""

from dataclasses import replace

import pytest
import torch
from tiny import ARGS

from llama import Transformer, parallel

WINDOW = 4


@pytest.fixture(scope="module")
def model() -> Transformer:
    """One layer, so that a position's logits depend on what its own query sees, and on nothing else."""
    parallel.initialize(device="cpu")
    torch.manual_seed(0)
    model = Transformer(replace(ARGS, n_layers=1, sliding_window=WINDOW, max_seq_len=16, max_batch_size=2)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("cached", [False, True, "token by token"])
@torch.no_grad()
def test_a_window_ends_where_it_should(model: Transformer, length: int, cached: bool | str) -> None:
    tokens = torch.arange(1, 1 + length).repeat(2, 1)
    tokens[1, 0] = 99  # rows differ in the first token only
    if cached == "token by token":
        logits = torch.cat([model(tokens[:, i : i + 1], i) for i in range(length)], dim=1)
    else:
        logits = model(tokens, 0) if cached else model(tokens)
    sees_first = [not torch.equal(logits[0, i], logits[1, i]) for i in range(length)]
    assert sees_first == [i < WINDOW for i in range(length)]
