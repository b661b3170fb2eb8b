"""Prompts of beams go into the caches of calls by hand, in passes that waste little on padding.

`plan_passes` decides which prompts, and which of their positions, each pass takes. Knows the model; knows no text and
no sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Transformer
from .forward_pass import compute_states
from .pieces import choose_end


@dataclass(frozen=True)
class PrefillPass:
    """A forward pass over the first `rows` prompts, at positions `start` to `end`."""

    start: int
    end: int
    rows: int


def plan_passes(lengths: Sequence[int], chunk: int) -> list[PrefillPass]:
    """Forward passes over prompts of these lengths, the longest first.

    Each takes at most `chunk` tokens, but at least one of each row.
    """
    passes: list[PrefillPass] = []
    start = 0
    while start < lengths[0]:
        unfinished = sorted(length for length in lengths if length > start)
        end = min(choose_end(unfinished), start + max(chunk // len(unfinished), 1))
        passes.append(PrefillPass(start, end, len(unfinished)))
        start = end
    return passes


def prefill(model: Transformer, prompt_tokens: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Run prompts, the longest first, through the model: the states of their last tokens (B, dim)."""
    last: list[Tensor] = [torch.empty(0)] * len(prompt_tokens)
    longest = len(prompt_tokens[0])
    # Right padding: a pad's key is overwritten by the row's own next token before any query can see it.
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompt_tokens]
    tokens = torch.tensor(padded, device=model.device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompt_tokens], device=model.device)  # (B)
    for one_pass in plan_passes([len(prompt) for prompt in prompt_tokens], chunk):
        rows, start = slice(0, one_pass.rows), one_pass.start
        h = compute_states(model, tokens[rows, start : one_pass.end], start, lengths[rows] - start)  # (rows, T, dim)
        for row in range(one_pass.rows):
            if len(prompt_tokens[row]) <= one_pass.end:
                last[row] = h[row, len(prompt_tokens[row]) - 1 - start]
    return torch.stack(last)
