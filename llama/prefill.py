"""Prompts into the KV cache: which rows and positions each forward pass takes, so that little is computed for padding
and a long prompt needs no more memory than a short one.

Knows the model; knows no text and no sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .model import Transformer
from .sampling import token_logprobs

WORTH_A_PASS = 32  # tokens of padding that cost as much as reading the weights once more
LOGPROB_CHUNK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Pass:
    """The first `rows` rows, at positions `start` to `end`."""

    start: int
    end: int
    rows: int


def passes(lengths: Sequence[int], chunk: int, start: int = 0) -> list[Pass]:
    """Forward passes over prompts of these lengths, the longest first, from `start` on.

    Each is of `chunk` tokens at most, or of one a row.
    """
    found: list[Pass] = []
    while start < lengths[0]:
        left = [length for length in lengths if length > start]
        end = min(worthwhile_end(left), start + max(chunk // len(left), 1))
        found.append(Pass(start, end, len(left)))
        start = end
    return found


def worthwhile_end(lengths: Sequence[int]) -> int:
    """The first length, of descending ones, at which to leave rows behind rather than to pad them on."""
    for longer, length in reversed(list(pairwise(lengths))):
        ended = sum(other <= length for other in lengths)
        if ended * (longer - length) >= WORTH_A_PASS:
            return length
    return lengths[0]


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], chunk: int, logprobs: bool, cached: int = 0
) -> tuple[Tensor, list[list[float]] | None]:
    """Run prompts, the longest first, through the network: (hidden states of their last tokens (B, dim), logprobs).

    logprobs: of each prompt's tokens, 0.0 for the first, which nothing predicts; None unless asked for.
    cached: positions of each row that the KV cache already has.
    """
    device = model.norm.weight.device
    longest = len(prompts[0])
    # Right padding: a pad's key is overwritten by the row's own next token before any query can see it.
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B)
    last: list[Tensor] = [torch.empty(0)] * len(prompts)
    chances = torch.zeros(tokens.shape, device=device)  # (B, T)
    for step in passes([len(prompt) for prompt in prompts], chunk, cached):
        here = slice(0, step.rows)
        h = model.hidden_states(tokens[here, step.start : step.end], step.start, lengths[here] - step.start)
        for row in range(step.rows):
            if step.start < len(prompts[row]) <= step.end:
                last[row] = h[row, len(prompts[row]) - 1 - step.start]
        if logprobs:
            following = tokens[here, step.start + 1 : step.end + 1]  # (rows, up to T)
            for a in range(0, following.shape[1], LOGPROB_CHUNK):
                wanted = following[:, a : a + LOGPROB_CHUNK]
                logits = model.logits(h[:, a : a + wanted.shape[1]])  # (rows, chunk, vocab_size)
                chances[here, step.start + 1 + a :][:, : wanted.shape[1]] = token_logprobs(logits, wanted)
    listed = [row[: len(prompt)] for row, prompt in zip(chances.tolist(), prompts, strict=True)] if logprobs else None
    return torch.stack(last), listed
