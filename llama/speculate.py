"""Decoding several tokens in a pass: some are proposed, and the model looks at all of them at once.

Every token is chosen as without proposals, from the same distribution by the same draw, so that the text is the same,
sampled or not. What is saved is passes. Knows rows and a streamer; knows no text.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import parallel
from .model import Transformer
from .rows import Row, Step
from .sampling import NEVER, processed, sample
from .streaming import NONE_LEFT, Asked, Streamer, told

Propose = Callable[[Row, int], list[int]]  # the tokens that may follow a row's own, at most so many
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
    return lambda row, most: lookup(row.prompt + row.answer, ngram, most)


@torch.no_grad()
def speculated(streamer: Streamer, rows: list[Row], asked: Asked, propose: Propose, most: int) -> Iterator[list[Step]]:
    """As `Streamer.run`, with up to 1 + `most` steps of each row after a pass, in their order."""
    streamer.current = ticket = object()
    streamer.proposed = streamer.kept = 0
    rows, h, known = streamer.prefilled(rows, asked, 0)
    if asked.echo:
        yield streamer.echo(rows, known)
        streamer.refuse_if_not(ticket)
    live, h = streamer.keep([row for row in rows if row.left > 0], rows, h)
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
        proposals = [propose(row, min(most, room, row.left - 1)) for row in live]
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
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    chosen = torch.full((*logits.shape[:2], 2 + 2 * asked.top), NOTHING, dtype=dtype, device=logits.device)
    with streamer.together_if_foreign(live):
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
    answer, found = list(row.answer), []
    for ahead, own in enumerate(logits[: 1 + len(proposed)]):
        if row.settings.changes_logits:
            own = processed(own, row.prompt, answer, row.settings, row.stops)
        uniform = row.draw(ahead)[None, None].to(logits.device) if row.settings.temperature > 0 else None
        none_left = row.settings.changes_logits and not bool((own > NEVER).any())
        token = NONE_LEFT if none_left else int(sample(own[None], row.settings, uniform))
        found.append(token)
        answer.append(token)
        if token < 0 or token in row.stops or token != [*proposed, None][ahead]:
            break
    return torch.tensor(found, device=logits.device)
