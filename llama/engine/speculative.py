"""Decoding several tokens in a pass: some are proposed, and the model looks at all of them at once.

Every token is chosen as without proposals, from the same distribution by the same draw, so that the text is the same,
sampled or not. What is saved is passes. Knows rows and a engine; knows no text.
"""

from collections import abc
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from .. import parallel
from ..model import Transformer
from .engine import Engine, OutputOptions, sampled, together_if_foreign, told
from .sequence import Sequence, Step, in_common
from .transfer import exact_dtype

SPECULATE_K = 5  # tokens that are proposed at a time
Propose = Callable[
    [list[Sequence], list[int]], list[list[int]]
]  # what may follow each row's own tokens, at most so many


def lookup(tokens: abc.Sequence[int], ngram: int, most: int) -> list[int]:
    """What followed when the last `ngram` tokens stood in the text before, the last time; nothing where they never did.

    Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
    """
    tail = list(tokens[-ngram:])
    for start in range(len(tokens) - ngram - 1, -1, -1):
        if tokens[start : start + ngram] == tail:
            return list(tokens[start + ngram : start + ngram + most])
    return []


def looking_up(ngram: int) -> Propose:
    """By `lookup` in each row's own text."""

    def propose(rows: list[Sequence], mosts: list[int]) -> list[list[int]]:
        return [lookup(row.prompt + row.answer, ngram, most) for row, most in zip(rows, mosts, strict=True)]

    return propose


@torch.no_grad()
def speculated(
    engine: Engine, rows: list[Sequence], output: OutputOptions, propose: Propose, most: int, cached: int = 0
) -> Iterator[list[Step]]:
    """As `Engine.run`, with up to 1 + `most` steps of each row after a pass, in their order."""
    ticket, live, h = yield from engine.begin(rows, output, cached)
    proposals: list[list[int]] = [[] for _ in live]
    states = h[:, None]  # (B, T, dim)
    while live:
        yield checked(engine, engine.model.logits(states), live, proposals, output)
        going = [row for row in live if row.finish_reason is None]
        if not going:
            return
        engine.refuse_if_not(ticket)
        live = engine.compact(live, going)
        room = min(engine.model.params.max_seq_len - row.position for row in live)  # which padding needs too
        proposals = propose(live, [min(most, room, row.left - 1) for row in live])
        states = look_at(engine.model, live, proposals)


def look_at(model: Transformer, rows: list[Sequence], proposals: list[list[int]]) -> Tensor:
    """Hidden states after each row's last token and after its proposals, padded: (B, T, dim)."""
    longest = max(map(len, proposals))
    padded = [[*own, *[0] * (longest - len(own))] for own in proposals]
    tokens = [[row.answer[-1], *own] for row, own in zip(rows, padded, strict=True)]  # (B, T)
    starts, device = torch.tensor([row.cached for row in rows]), model.device
    one_by_one = torch.arange(1, 2 + longest, device=device).expand(len(rows), -1)  # (B, T)
    return model.hidden_states(torch.tensor(tokens, device=device), starts, one_by_one)


def checked(
    engine: Engine, logits: Tensor, live: list[Sequence], proposals: list[list[int]], output: OutputOptions
) -> list[Step]:
    """Each row's steps, up to the first that isn't what was proposed: of logits (B, T, vocab_size).

    All of them are chosen at once, as if all proposals were right: those that come after a wrong one aren't looked at.
    """
    counts = [1 + len(own) for own in proposals]
    told_of = torch.zeros(2 + 2 * output.top, sum(counts), dtype=exact_dtype(logits.device), device=logits.device)
    with together_if_foreign(live):
        if parallel.is_group_leader():
            wanted = torch.cat([own[:count] for own, count in zip(logits, counts, strict=True)])  # (sum, vocab_size)
            each = [row for row, count in zip(live, counts, strict=True) for _ in range(count)]
            ahead = [own[:i] for own in proposals for i in range(1 + len(own))]  # if these are right
            told_of[:] = told(wanted, sampled(wanted, each, ahead), output)
    lines = iter(parallel.broadcast(told_of).T.tolist())
    steps: list[Step] = []
    for row, own, count in zip(live, proposals, counts, strict=True):
        before = len(steps)
        for line, guess in zip(list(islice(lines, count)), [*own, None], strict=True):
            steps.append(engine.accepted(row, line, output))
            if row.finish_reason is not None or line[0] != guess:
                break
        row.cached = row.position - 1  # whatever stands beyond was proposed in vain
        engine.proposed += len(own)
        engine.kept += len(steps) - before - 1
    return steps


class Drafting:
    """Proposes what a smaller model says, which chooses by the rows' own draws: so it often says what the model will.

    A row's slot of its cache is the row's index; what stands there from an earlier stream is used again.
    """

    def __init__(self, model: Transformer, chunk: int):
        self._model = model
        self._chunk = chunk
        self._fed: list[list[int]] = [[] for _ in range(model.params.max_batch_size)]  # what each slot has cached

    def __call__(self, rows: list[Sequence], mosts: list[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        for _ in range(max(mosts)):
            h = self._feed(rows, [row.prompt + row.answer + own for row, own in zip(rows, found, strict=True)])
            if h is None:
                break
            logits = self._model.logits(h)  # (rows, vocab_size), in which all ranks take part
            tokens = torch.zeros(len(rows), dtype=torch.long, device=h.device)
            with together_if_foreign(rows):
                if parallel.is_group_leader():
                    tokens[:] = sampled(logits, rows, found)
            for own, token in zip(found, parallel.broadcast(tokens).tolist(), strict=True):
                own.append(max(token, 0))
        return [own[:most] for own, most in zip(found, mosts, strict=True)]

    def _feed(self, rows: list[Sequence], texts: list[list[int]]) -> Tensor | None:
        """Put what is new of texts through the model: hidden states of their last tokens (rows, dim).

        None where padding would not fit the cache: the last few tokens of a full window are chosen one by one.
        """
        slots = {row.index: place for place, row in enumerate(rows)}
        count = max(slots) + 1
        for slot, fed in enumerate(self._fed[:count]):  # the slots of rows that ended go along idly, from 0 on
            del fed[in_common(fed, texts[slots[slot]][:-1]) if slot in slots else 0 :]
        chunk = max(self._chunk // count, 1)
        last: dict[int, Tensor] = {}
        while len(last) < len(rows):
            new = {row.index: text[len(self._fed[row.index]) :][:chunk] for row, text in zip(rows, texts, strict=True)}
            longest = max(map(len, new.values()))
            starts = [len(fed) for fed in self._fed[:count]]
            if max(starts) + longest > self._model.params.max_seq_len:
                return None
            tokens = [new.get(slot, []) + [0] * (longest - len(new.get(slot, []))) for slot in range(count)]
            device = self._model.device
            h = self._model.hidden_states(torch.tensor(tokens, device=device), torch.tensor(starts))
            for slot, own in new.items():
                self._fed[slot] += own
                if own and len(self._fed[slot]) == len(texts[slots[slot]]):
                    last[slot] = h[slot, len(own) - 1]
        return torch.stack([last[row.index] for row in rows])
