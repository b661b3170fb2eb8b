"""Forward passes of the engine: rows of tokens at slots of the KV cache in, states and prompts' logprobs out.

Knows the model; knows no sampling, and nothing of what is decided between two passes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Transformer
from .choices import describe_choices
from .forward_pass import compute_logits, compute_states, is_dynamic, is_intercepted
from .pass_rows import show_rows
from .sequence import Sequence as TokenSequence
from .sequence import read_alternatives
from .transfer import copy_to_device

# From the model, tokens (B, T), their first positions, and lengths and slots as `hidden_states` takes them, to states.
Compute = Callable[[Transformer, Tensor, Tensor, Tensor | None, Tensor], Tensor]
LOGPROB_CHUNK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class PassRow:
    """A row of a pass: tokens of a sequence, which stand at positions from `start` on, at a slot."""

    sequence: TokenSequence
    slot: int
    start: int
    tokens: Sequence[int]


@contextlib.contextmanager
def settle(model: Transformer, calls_back: bool, look: bool = True) -> Iterator[None]:
    """Look for edits of the model once, and not at each pass, unless a caller's function is called in between.

    look: whether to look at all.
    """
    if look:
        model.refresh()
    fast = model.fast
    if fast is None or calls_back or is_intercepted(model):
        yield
        return
    before, fast.is_settled = fast.is_settled, True
    try:
        yield
    finally:
        fast.is_settled = before


def run_rows(
    model: Transformer, rows: Sequence[PassRow], tokens: Tensor | None = None, compute: Compute = compute_states
) -> list[Tensor]:
    """The states of each row's tokens, (T of the row, dim) each, in the order of `rows`.

    tokens: (B), on the model's device, in place of those of rows of one token.
    """
    in_order = any(row.sequence.in_order for row in rows)
    ordered = sorted(range(len(rows)), key=lambda i: rows[i].sequence.key if in_order else rows[i].slot)
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in split_by_room([rows[i] for i in ordered], model.params.max_seq_len):
        places = [ordered[i] for i in group]
        own = [rows[i] for i in places]
        given = tokens if tokens is None or places == list(range(len(rows))) else tokens[places]
        for i, row, h in zip(places, own, run_pass(model, own, given, compute).unbind(), strict=True):
            states[i] = h if len(h) == len(row.tokens) else h[: len(row.tokens)]
    return states


def split_by_room(rows: Sequence[PassRow], max_seq_len: int) -> list[list[int]]:
    """Places of rows that go through the model together: those whose padding would not fit the cache go alone."""
    longest = max(len(row.tokens) for row in rows)
    fitting = [i for i, row in enumerate(rows) if row.start + longest <= max_seq_len]
    alone = [[i] for i, row in enumerate(rows) if row.start + longest > max_seq_len]
    return [fitting, *alone] if fitting else alone


def run_pass(model: Transformer, rows: Sequence[PassRow], tokens: Tensor | None, compute: Compute) -> Tensor:
    """One forward pass over rows, padded on the right: states (B, T, dim). tokens: as in `run_rows`."""
    longest = max(len(row.tokens) for row in rows)
    if tokens is None:
        padded = [[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows]
        batch = copy_to_device(torch.tensor(padded), model.device)  # (B, T)
    else:
        batch = tokens[:, None]
    on_gpu = model.device.type == "cuda"
    starts = torch.tensor([row.start for row in rows], pin_memory=on_gpu)  # (B)
    slots = torch.tensor([row.slot for row in rows], pin_memory=on_gpu)  # (B)
    with show_rows([row.sequence for row in rows]):
        return compute(model, batch, starts, count_tokens(model, rows, longest), slots)


def count_tokens(model: Transformer, rows: Sequence[PassRow], longest: int) -> Tensor | None:
    """How many tokens from the row's first one there are up to each token, (B, T), for `dynamic` rotary scaling.

    A prompt is rotated as a whole, and each token of the answer as if it were the last.
    """
    if not is_dynamic(model):
        return None
    counts = torch.arange(1, 1 + longest).expand(len(rows), -1)  # (B, T)
    prompts = torch.tensor([[len(row.sequence.prompt) - row.start] for row in rows])  # (B, 1)
    return counts.maximum(prompts).to(model.device)


def compute_prompt_logprobs(model: Transformer, rows: Sequence[PassRow], states: Sequence[Tensor]) -> None:
    """Note the logprobs of those tokens of prompts that the states of these rows predict, where they are wanted.

    So are the likeliest tokens in their places.
    """
    spans: list[tuple[TokenSequence, int, int]] = []  # sequences, and the tokens whose logprobs are computed
    parts: list[Tensor] = []
    for row, h in zip(rows, states, strict=True):
        s = row.sequence
        first, end = max(row.start + 1, s.first), min(row.start + 1 + len(h), len(s.prompt))
        if s.wants_prompt_logprobs and first < end:
            spans.append((s, first, end))
            parts.append(h[first - 1 - row.start : end - 1 - row.start])
    if not spans:
        return
    predicted = [token for s, first, end in spans for token in s.prompt[first:end]]
    all_states, tokens = torch.cat(parts), torch.tensor(predicted, device=parts[0].device)  # (N, dim), (N)
    chunks = zip(all_states.split(LOGPROB_CHUNK), tokens.split(LOGPROB_CHUNK), strict=True)
    top = max(s.output.top for s, _, _ in spans)
    tables = [describe_choices(compute_logits(model, x), y, True, top) for x, y in chunks]
    columns = torch.cat(tables, dim=1).T.tolist()
    for s, first, end in spans:
        own, columns = columns[: end - first], columns[end - first :]
        s.prompt_logprobs[first:] = [logprob for _, logprob, *_ in own]
        s.prompt_tops[first:] = [read_alternatives(best, s.output.top) for _, _, *best in own]
