"""Prefill: prompts go into the KV cache in forward passes that waste little on padding and need bounded memory.

`plan_passes` decides which prompts, and which of their positions, each pass takes. Knows the model; knows no text and
no sampling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from ..model import Transformer
from ..sampling import token_logprobs

WORTH_A_PASS = 32  # tokens of padding that cost as much as one more pass, which reads the weights once more
LOGPROB_CHUNK = 256  # positions, of all rows together, whose logits are held at once


@dataclass(frozen=True)
class PrefillPass:
    """A forward pass over the first `rows` prompts, at positions `start` to `end`."""

    start: int
    end: int
    rows: int


def plan_passes(lengths: Sequence[int], chunk: int, start: int = 0) -> list[PrefillPass]:
    """Forward passes over prompts of these lengths, the longest first, from position `start` on.

    Each takes at most `chunk` tokens, but at least one of each row.
    """
    passes: list[PrefillPass] = []
    while start < lengths[0]:
        unfinished = [length for length in lengths if length > start]
        end = min(choose_end(unfinished), start + max(chunk // len(unfinished), 1))
        passes.append(PrefillPass(start, end, len(unfinished)))
        start = end
    return passes


def choose_end(lengths: Sequence[int]) -> int:
    """The position at which a pass over prompts of these lengths, the longest first, should end.

    It is the first length at which padding the finished prompts further would cost more than another pass without them.
    The pass may have to end earlier, to keep within its chunk.
    """
    for longer, length in reversed(list(pairwise(lengths))):
        finished = sum(other <= length for other in lengths)
        if finished * (longer - length) >= WORTH_A_PASS:
            return length
    return lengths[0]


def prefill(
    model: Transformer, prompt_tokens: Sequence[Sequence[int]], chunk: int, logprobs: bool, cached: int = 0
) -> tuple[Tensor, list[list[float]] | None]:
    """Run prompts, the longest first, through the model: hidden states of their last tokens (B, dim), and logprobs.

    logprobs: whether to give those of each prompt's tokens; the first token's is 0.0, since nothing predicts it.
    cached: positions of each prompt that the KV cache already holds; their logprobs are given as 0.0.
    """
    last: list[Tensor] = [torch.empty(0)] * len(prompt_tokens)
    all_logprobs = [[0.0] * (cached + 1) for _ in prompt_tokens]
    for one_pass, h in run_passes(model, prompt_tokens, chunk, cached):
        for row in range(one_pass.rows):
            if len(prompt_tokens[row]) <= one_pass.end:
                last[row] = h[row, len(prompt_tokens[row]) - 1 - one_pass.start]
        if logprobs:
            new_logprobs = compute_logprobs(model, prompt_tokens, [1] * len(prompt_tokens), one_pass, h)
            for row_logprobs, new in zip(all_logprobs, new_logprobs, strict=False):
                row_logprobs += new
    return torch.stack(last), all_logprobs if logprobs else None


def run_passes(
    model: Transformer, prompt_tokens: Sequence[Sequence[int]], chunk: int, cached: int = 0
) -> Iterator[tuple[PrefillPass, Tensor]]:
    """Run prompts, the longest first, through the model: each pass, and its hidden states (rows, T, dim), normed."""
    longest = len(prompt_tokens[0])
    # Right padding: a pad's key is overwritten by the row's own next token before any query can see it.
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompt_tokens]
    tokens = torch.tensor(padded, device=model.device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompt_tokens], device=model.device)  # (B)
    for one_pass in plan_passes([len(prompt) for prompt in prompt_tokens], chunk, cached):
        rows, start = slice(0, one_pass.rows), one_pass.start
        yield one_pass, model.hidden_states(tokens[rows, start : one_pass.end], start, lengths[rows] - start)


def compute_logprobs(
    model: Transformer, prompt_tokens: Sequence[Sequence[int]], firsts: Sequence[int], one_pass: PrefillPass, h: Tensor
) -> list[list[float]]:
    """For each row of a pass, the logprobs of the prompt's tokens that its hidden states h (rows, T, dim) predict.

    firsts: for each prompt, the first token to give the logprob of, from 1 on.
    """
    rows = range(one_pass.rows)
    ends = [min(one_pass.end, len(prompt_tokens[row]) - 1) for row in rows]  # a prompt's last token predicts none of it
    starts = [min(max(one_pass.start, firsts[row] - 1), ends[row]) for row in rows]
    states = torch.cat([h[row, starts[row] - one_pass.start : ends[row] - one_pass.start] for row in rows])  # (N, dim)
    predicted = [token for row in rows for token in prompt_tokens[row][starts[row] + 1 : ends[row] + 1]]
    tokens = torch.tensor(predicted, dtype=torch.long, device=h.device)  # (N)
    chunks = zip(states.split(LOGPROB_CHUNK), tokens.split(LOGPROB_CHUNK), strict=True)
    logprobs = [token_logprobs(model.logits(x), y) for x, y in chunks if len(y)]
    values = iter(torch.cat(logprobs).tolist() if logprobs else [])
    return [list(islice(values, ends[row] - starts[row])) for row in rows]
