"""What tests/checkpoints/test_families.py runs on 1, 2, 4 and 8 ranks: reads checkpoints and returns their logits.

Each way of asking gives the logits of all its positions.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama.accelerate.accelerator import Accelerator
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.model import Transformer
from llama.parallel import initialize

SHORT, LENGTH = 6, 13  # of a whole text: the first row's first tokens, and all of them
PROMPTS, STEPS = (4, 9), 4  # of the ragged rows: what each is prefilled with, and how many single tokens follow
SIZES = {"max_seq_len": 16, "max_batch_size": 2}


def whole(model: Transformer, rows: Tensor, start_pos: int | None) -> Tensor:
    return torch.cat([model(rows[:1, :length], start_pos)[0] for length in (SHORT, LENGTH)])


def token_by_token(model: Transformer, rows: Tensor) -> Tensor:
    return torch.cat([model(rows[:1, i : i + 1], i)[0] for i in range(LENGTH)])


def ragged(model: Transformer, rows: Tensor) -> Tensor:
    """Both rows side by side, right-padded with token 0, then one token of each at its own position."""
    lengths = torch.tensor(PROMPTS)
    steps = lengths[:, None] + torch.arange(STEPS)
    prompts = torch.where(torch.arange(max(PROMPTS)) < lengths[:, None], rows[:, : max(PROMPTS)], 0)
    prefilled = model.logits(model.hidden_states(prompts, 0, lengths=lengths))
    following = torch.cat([model(rows.gather(1, at[:, None]), at) for at in steps.unbind(1)], dim=1)
    return torch.cat([torch.cat([prefilled[i, :length], following[i]]) for i, length in enumerate(PROMPTS)])


WAYS: dict[str, Callable[[Transformer, Tensor], Tensor]] = {
    "whole": partial(whole, start_pos=None),
    "whole through the cache": partial(whole, start_pos=0),
    "token by token": token_by_token,
    "ragged rows": ragged,
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """On every rank, which has a part of its own."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def compute(rows: Tensor, jobs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """For each {"directory": a checkpoint, "ways": names of WAYS, "fast": those that the fast form is asked in too}."""
    place, results = initialize(device="cpu", dtype=torch.float32), []
    for job in jobs:
        checkpoint = open_checkpoint(job["directory"])
        args, accelerator = replace(checkpoint.sizes, **SIZES), Accelerator()
        model = load_model(checkpoint, args, place)
        with torch.no_grad():
            result = {way: WAYS[way](model, rows) for way in job["ways"]}
        if job["fast"]:
            fast = load_model(checkpoint, args, place, accelerator.pack_weight)
            accelerator.finish(fast)
            with torch.no_grad():
                result |= {f"{way}, fast": WAYS[way](fast, rows) for way in job["fast"]}
            assert_same(fast.state_dict(), model.state_dict())
        result["bytes"] = torch.tensor([sum(x.nbytes for x in xs) for xs in (model.parameters(), model.buffers())])
        result["tied"] = torch.tensor(model.output.weight is model.tok_embeddings.weight)
        results.append(result)
    return results
