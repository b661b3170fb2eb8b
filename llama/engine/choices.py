"""Logits to chosen tokens, of many sequences at once: each by its own settings and random numbers.

The first rank of the model-parallel group chooses for all. What goes wrong in one row is told of that row. Knows
sequences and tensors; knows no model and no cache.
"""

from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel
from ..errors import LlamaError
from ..sampling import NEVER, Context, apply_logits_processors, sample, token_logprobs
from .sequence import Sequence
from .transfer import copy_to_device, exact_dtype

NOT_FINITE, NONE_LEFT, FAILED = -1, -2, -3  # in the place of a token that could not be chosen


@dataclass(frozen=True)
class Place:
    """Where a token is to be chosen: after a sequence's answer and some proposals."""

    sequence: Sequence
    proposals: abc.Sequence[int] = ()


@dataclass
class Choices:
    """The tokens chosen at places, and what steps report of them."""

    table: Tensor  # (2 + 2 top, N + 1), see `describe_choices` and `choose`; the same on all ranks
    failures: dict[int, Exception]  # by place: what a logits processor or a grammar raised; only on the rank that chose

    def share_failures(self, rows: abc.Sequence[abc.Sequence[float]]) -> dict[int, str]:
        """By place, what a logits processor or a grammar raised, on all ranks. rows: the table's columns on the CPU."""
        if all(row[0] != FAILED for row in rows):
            return {}
        messages = {
            place: str(e) if isinstance(e, LlamaError) else f"{type(e).__name__}: {e}"
            for place, e in self.failures.items()
        }
        return parallel.broadcast_object(messages, parallel.group())


def choose(logits: Tensor, places: abc.Sequence[Place], told: abc.Sequence[int] = ()) -> Choices:
    """The next token at each place: logits (N, vocab_size).

    told: at most 2 numbers other than 0 of the rank that chooses, which all ranks find in a further column.
    """
    top = max(place.sequence.output.top for place in places)
    logprobs = any(place.sequence.output.logprobs for place in places)
    table = torch.zeros(2 + 2 * top, len(places) + 1, dtype=exact_dtype(logits.device), device=logits.device)
    failures: dict[int, Exception] = {}
    if parallel.is_group_leader():
        tokens = choose_tokens(logits, places, failures)
        table[:, :-1] = describe_choices(logits, tokens, logprobs, top)
        for i, number in enumerate(told):
            table[i, -1] = number
    return Choices(parallel.broadcast(table), failures)


def choose_tokens(logits: Tensor, places: abc.Sequence[Place], failures: dict[int, Exception]) -> Tensor:
    """The tokens (N) at places with logits (N, vocab_size). failures: gets what logits processors and
    grammars raise."""
    changed = [i for i, place in enumerate(places) if place.sequence.changes_logits]
    original = logits
    if changed:
        logits = logits.clone()
    for i in changed:
        s = places[i].sequence
        answer = [*s.answer, *places[i].proposals]
        context = Context(s.prompt, answer, s.stops)
        try:
            own = apply_logits_processors(logits[i], s.settings, context)
            logits[i] = own if s.matcher is None else s.matcher.mask(own, answer, s.stops)
        except Exception as e:  # whatever a caller's function raises is its own request's failure
            failures[i] = e
            continue
        if logits[i].isnan().any() and original[i].isfinite().all():
            failures[i] = LlamaError("logits_processor, or another setting, has made logits NaN")
    groups: dict[tuple[object, ...], list[int]] = {}  # places whose tokens are sampled together
    for i, place in enumerate(places):
        groups.setdefault(place.sequence.settings.narrowing, []).append(i)
    tokens = torch.empty(len(places), dtype=torch.long, device=logits.device)
    for members in groups.values():
        settings, uniform = places[members[0]].sequence.settings, None
        if settings.temperature > 0:
            draws = torch.stack([places[i].sequence.draw(len(places[i].proposals)) for i in members])
            uniform = copy_to_device(draws[:, None], logits.device)  # (B, 1)
        if len(members) == len(places):
            tokens = sample(logits, settings, uniform)
        else:
            tokens[members] = sample(logits[members], settings, uniform)
    if changed:
        tokens = tokens.where((logits > NEVER).any(dim=-1), NONE_LEFT)
    tokens = tokens.where(find_finite(original), NOT_FINITE)
    if failures:
        tokens[list(failures)] = FAILED
    return tokens


def find_finite(logits: Tensor) -> Tensor:
    """Which rows of logits (N, vocab_size) are finite: booleans (N)."""
    if logits.device.type == "cpu":
        finite = logits.sum(dim=-1).isfinite()  # a tenth of the time; but a sum of large numbers overflows
        if finite.all():
            return finite
    return logits.isfinite().all(dim=-1)


def describe_choices(logits: Tensor, tokens: Tensor, logprobs: bool, top: int) -> Tensor:
    """What steps report of tokens (N) that were chosen from logits (N, vocab_size): (2 + 2 top, N).

    The tokens; their logprobs, or 0 where nobody asks for them; then by turns one of the `top` likeliest tokens and its
    logprob.
    """
    lines = [tokens, token_logprobs(logits, tokens.clamp(min=0)) if logprobs else torch.zeros_like(logits[:, 0])]
    if top:
        best = logits.topk(top)  # (N, top)
        best_logprobs = token_logprobs(logits[:, None].expand(-1, top, -1), best.indices)  # (N, top)
        lines += [line for pair in zip(best.indices.T, best_logprobs.T, strict=True) for line in pair]
    return torch.stack([line.to(exact_dtype(logits.device)) for line in lines])
