"""Prompts into the KV cache: which rows and positions each forward pass takes, so that little is computed for padding
and a long prompt needs no more memory than a short one.

Knows the model; knows no text and no sampling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from ..model import Transformer
from ..sampling import token_logprobs

WORTH_A_PASS = 32  # tokens of padding that cost as much as reading the weights once more
LOGPROB_CHUNK = 256  # positions, of all rows together, whose logits are held at once


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

    logprobs: of each prompt's tokens, None unless asked for; 0.0 for the first, which nothing predicts.
    cached: positions of each row that the KV cache has already, whose logprobs aren't told.
    """
    last: list[Tensor] = [torch.empty(0)] * len(prompts)
    chances = [[0.0] * (cached + 1) for _ in prompts]
    for step, h in walk(model, prompts, chunk, cached):
        for row in range(step.rows):
            if len(prompts[row]) <= step.end:
                last[row] = h[row, len(prompts[row]) - 1 - step.start]
        if logprobs:
            for known, more in zip(chances, logprobs_within(model, prompts, [1] * len(prompts), step, h), strict=False):
                known += more
    return torch.stack(last), chances if logprobs else None


def walk(
    model: Transformer, prompts: Sequence[Sequence[int]], chunk: int, cached: int = 0
) -> Iterator[tuple[Pass, Tensor]]:
    """Run prompts, the longest first, through the network: each pass, and its hidden states (rows, T, dim), normed."""
    device = model.device
    longest = len(prompts[0])
    # Right padding: a pad's key is overwritten by the row's own next token before any query can see it.
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B)
    for step in passes([len(prompt) for prompt in prompts], chunk, cached):
        here = slice(0, step.rows)
        h = model.hidden_states(tokens[here, step.start : step.end], step.start, lengths[here] - step.start)
        yield step, h


def logprobs_within(
    model: Transformer, prompts: Sequence[Sequence[int]], firsts: Sequence[int], step: Pass, h: Tensor
) -> list[list[float]]:
    """For each row of a pass, the logprobs of what its hidden states predict of the prompt: h is (rows, T, dim).

    firsts: the first token of each prompt, from 1 on, whose logprob is wanted.
    """
    rows = range(step.rows)
    ends = [min(step.end, len(prompts[row]) - 1) for row in rows]  # nothing follows a last token
    starts = [min(max(step.start, firsts[row] - 1), ends[row]) for row in rows]
    before = torch.cat([h[row, starts[row] - step.start : ends[row] - step.start] for row in rows])  # (N, dim)
    following = [token for row in rows for token in prompts[row][starts[row] + 1 : ends[row] + 1]]
    tokens = torch.tensor(following, dtype=torch.long, device=h.device)  # (N)
    pieces = zip(before.split(LOGPROB_CHUNK), tokens.split(LOGPROB_CHUNK), strict=True)
    found = [token_logprobs(model.logits(x), y) for x, y in pieces if len(y)]
    chances = iter(torch.cat(found).tolist() if found else [])
    return [list(islice(chances, ends[row] - starts[row])) for row in rows]
