"""Decoding several tokens in a pass: some are proposed, and the model looks at all of them at once.

Every token is chosen as without proposals, from the same distribution by the same draw, so that the text is the same,
sampled or not. What is saved is passes. Knows rows and a streamer; knows no text.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import parallel
from .model import Transformer
from .rows import Row, Step, in_common
from .streaming import Asked, Streamer, sampled, together_if_foreign, told
from .transfer import exact_dtype

Propose = Callable[[list[Row], list[int]], list[list[int]]]  # what may follow each row's own tokens, at most so many
NOTHING = -3  # in the place of a token that wasn't chosen, since one before it wasn't what had been proposed


def lookup(tokens: Sequence[int], ngram: int, most: int) -> list[int]:
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

    def propose(rows: list[Row], mosts: list[int]) -> list[list[int]]:
        return [lookup(row.prompt + row.answer, ngram, most) for row, most in zip(rows, mosts, strict=True)]

    return propose


@torch.no_grad()
def speculated(streamer: Streamer, rows: list[Row], asked: Asked, propose: Propose, most: int) -> Iterator[list[Step]]:
    """As `Streamer.run`, with up to 1 + `most` steps of each row after a pass, in their order."""
    ticket, live, h = yield from streamer.begin(rows, asked)
    proposals: list[list[int]] = [[] for _ in live]
    states = h[:, None]  # (B, T, dim)
    while live:
        yield checked(streamer, streamer.model.logits(states), live, proposals, asked)
        going = [row for row in live if row.finish_reason is None]
        if not going:
            return
        streamer.refuse_if_not(ticket)
        live = streamer.compact(live, going)
        room = min(streamer.model.params.max_seq_len - row.position for row in live)  # which padding needs too
        proposals = propose(live, [min(most, room, row.left - 1) for row in live])
        states = look_at(streamer.model, live, proposals)


def look_at(model: Transformer, rows: list[Row], proposals: list[list[int]]) -> Tensor:
    """Hidden states after each row's last token and after its proposals, padded: (B, T, dim)."""
    longest = max(map(len, proposals))
    padded = [[*own, *[0] * (longest - len(own))] for own in proposals]
    tokens = [[row.answer[-1], *own] for row, own in zip(rows, padded, strict=True)]  # (B, T)
    starts = torch.tensor([row.cached for row in rows])
    return model.hidden_states(torch.tensor(tokens, device=model.norm.weight.device), starts)


def checked(
    streamer: Streamer, logits: Tensor, live: list[Row], proposals: list[list[int]], asked: Asked
) -> list[Step]:
    """Each row's steps, up to the first that isn't what was proposed: of logits (B, T, vocab_size)."""
    shape = *logits.shape[:2], 2 + 2 * asked.top
    chosen = torch.full(shape, NOTHING, dtype=exact_dtype(logits.device), device=logits.device)
    with together_if_foreign(live):
        if parallel.leads_group():
            for place, (row, own) in enumerate(zip(live, proposals, strict=True)):
                found = chosen_of(logits[place], row, own)
                chosen[place, : len(found)] = told(logits[place, : len(found)], found, asked).T
    steps: list[Step] = []
    for row, own, lines in zip(live, proposals, parallel.broadcast(chosen).tolist(), strict=True):
        before = len(steps)
        for line in lines:
            if line[0] == NOTHING or row.finish_reason is not None:  # an answer may end before what was chosen does
                break
            steps.append(streamer.accepted(row, line, asked))
        row.cached = row.position - 1  # whatever stands beyond was proposed in vain
        streamer.proposed += len(own)
        streamer.kept += len(steps) - before - 1
    return steps


def chosen_of(logits: Tensor, row: Row, proposed: list[int]) -> Tensor:
    """The tokens that a row gets, (up to T), of logits (T, vocab_size): each as if it were chosen by itself."""
    found: list[int] = []
    for own, guess in zip(logits, [*proposed, None], strict=False):
        token = int(sampled(own[None], [row], [found]))
        found.append(token)
        if token < 0 or token in row.stops or token != guess:
            break
    return torch.tensor(found, device=logits.device)


class Drafting:
    """Proposes what a smaller model says, which chooses by the rows' own draws: so it often says what the model will.

    The slots of its cache are the rows' indices, of which there are `count`; those of rows that ended go along idly.
    """

    def __init__(self, model: Transformer, chunk: int, count: int):
        self._model = model
        self._chunk = max(chunk // count, 1)
        self._fed: list[list[int]] = [[] for _ in range(count)]  # tokens whose keys and values each slot has

    def __call__(self, rows: list[Row], mosts: list[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        for _ in range(max(mosts)):
            h = self._feed(rows, [row.prompt + row.answer + own for row, own in zip(rows, found, strict=True)])
            if h is None:
                break
            logits = self._model.logits(h)  # (rows, vocab_size), in which all ranks take part
            tokens = torch.zeros(len(rows), dtype=torch.long, device=h.device)
            with together_if_foreign(rows):
                if parallel.leads_group():
                    tokens[:] = sampled(logits, rows, found)
            for own, token in zip(found, parallel.broadcast(tokens).tolist(), strict=True):
                own.append(max(token, 0))
        return [own[:most] for own, most in zip(found, mosts, strict=True)]

    def _feed(self, rows: list[Row], texts: list[list[int]]) -> Tensor | None:
        """Put what is new of texts through the model: hidden states of their last tokens (rows, dim).

        None where padding would not fit the cache: the last few tokens of a full window are chosen one by one.
        """
        last: list[Tensor | None] = [None] * len(rows)
        for row, text in zip(rows, texts, strict=True):
            del self._fed[row.index][in_common(self._fed[row.index], text[:-1]) :]
        while any(state is None for state in last):
            new = [text[len(self._fed[row.index]) :][: self._chunk] for row, text in zip(rows, texts, strict=True)]
            longest = max(map(len, new))
            tokens, starts = [[0] * longest for _ in self._fed], [0] * len(self._fed)
            for row, own in zip(rows, new, strict=True):
                tokens[row.index][: len(own)], starts[row.index] = own, len(self._fed[row.index])
            if max(starts) + longest > self._model.params.max_seq_len:
                return None
            device = self._model.norm.weight.device
            h = self._model.hidden_states(torch.tensor(tokens, device=device), torch.tensor(starts))
            for place, (row, own) in enumerate(zip(rows, new, strict=True)):
                self._fed[row.index] += own
                if own and len(self._fed[row.index]) == len(texts[place]):
                    last[place] = h[row.index, len(own) - 1]
        return torch.stack([state for state in last if state is not None])
