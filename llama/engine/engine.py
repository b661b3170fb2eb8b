"""The one primitive of generation: rows go through the model together, each to its own end, a token at a time.

Knows the model, the KV cache and which row owns which of its slots; knows no file and no batch of texts.
"""

import contextlib
from collections import abc
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel
from ..errors import LlamaError
from ..model import Transformer
from ..sampling import NEVER, processed, sample, token_logprobs
from .scheduler import prefill
from .sequence import Sequence, Step
from .transfer import Arriving, exact_dtype, sent

NOT_FINITE, NONE_LEFT = -1, -2  # in the place of a token


@dataclass(frozen=True)
class OutputOptions:
    """What steps shall tell. echo: the prompts' own tokens first. top: how many of the likeliest tokens."""

    logprobs: bool = False
    echo: bool = False
    top: int = 0


class Engine:
    """A model's rows. One KV cache, so one stream at a time: a newer one ends those before it.

    proposed, kept: tokens of the last stream that were proposed (see speculate.py), and those of them that were chosen.
    current: the stream that owns it. ahead: start a step before the tokens that go into it were read.
    """

    def __init__(self, model: Transformer, prefill_chunk: int):
        self.model = model
        self.current: object = None
        self.proposed = self.kept = 0
        self.ahead = self._device.type == "cuda"
        self.prefill_chunk = prefill_chunk

    @torch.no_grad()
    def run(self, rows: list[Sequence], output: OutputOptions, cached: int = 0) -> Iterator[list[Step]]:
        """After every forward pass one step for each row still going; first, if asked for, those of the prompts.

        Rows with the same prompt share its prefill. cached: tokens of a single row's prompt that its slot already has.
        """
        ticket, live, h = yield from self.begin(rows, output, cached)
        while live:
            picked = self._choose(self.model.logits(h), live, output)
            arriving, next_live = Arriving(picked), live
            if self.ahead:  # one that now stops is in that step for nothing; whose last token this is isn't
                next_live, h = self._decode([row for row in live if row.left > 1], live, picked[0])
            steps = self._accept(arriving.wait(), live, output)
            yield sorted(steps, key=lambda step: step.row)
            going = [row for row in live if row.finish_reason is None]
            if not going:
                return
            self.refuse_if_not(ticket)
            if self.ahead:
                live, h = self._keep(going, next_live, h)
            else:
                live, h = self._decode(going, live, picked[0])

    def begin(
        self, rows: list[Sequence], output: OutputOptions, cached: int = 0
    ) -> Generator[list[Step], None, tuple[object, list[Sequence], Tensor]]:
        """Prefill, and yield the prompts where they are asked for.

        Returns what to `refuse_if_not` with, the rows that go on, in the order of their slots, and hidden states of
        their last tokens (B, dim).
        """
        ticket = self.take_cache()
        self.proposed = self.kept = 0
        rows, h, known = self._prefill(rows, output, cached)
        if output.echo:
            yield self._echo(rows, known)
            self.refuse_if_not(ticket)
        return ticket, *self._keep([row for row in rows if row.left > 0], rows, h)

    def take_cache(self) -> object:
        """End whatever stream relies on the KV cache; what comes back is whose it is now."""
        self.model.refresh()
        self.current = object()
        return self.current

    def refuse_if_not(self, ticket: object) -> None:
        """To be called after each yield and before the cache is touched: a caller may have started another stream."""
        if self.current is not ticket:
            raise LlamaError("this stream was ended by a newer call on the same Llama: use one at a time")
        self.model.refresh()

    def _prefill(
        self, rows: list[Sequence], output: OutputOptions, cached: int
    ) -> tuple[list[Sequence], Tensor, Mapping[tuple[int, ...], list[float]]]:
        """(rows in the order of their slots, hidden states of their last tokens (B, dim), logprobs of each prompt)."""
        owners = {tuple(row.prompt): row for row in reversed(rows)}
        firsts = sorted(owners.values(), key=lambda row: (-row.position, row.index))  # the longest has the first slot
        prompts = [row.prompt for row in firsts]
        h, known = prefill(self.model, prompts, self.prefill_chunk, output.echo and output.logprobs, cached)
        slots = {tuple(prompt): slot for slot, prompt in enumerate(prompts)}
        others = [row for row in rows if owners[tuple(row.prompt)] is not row]
        for slot, row in enumerate(others, len(firsts)):
            self.model.copy_cache_row(slots[tuple(row.prompt)], slot, row.position)
        rows = firsts + others
        if others:
            h = h[[slots[tuple(row.prompt)] for row in rows]]
        return rows, h, dict(zip(slots, known or (), strict=False))

    def _keep(self, keep: list[Sequence], rows: list[Sequence], x: Tensor) -> tuple[list[Sequence], Tensor]:
        """The rows to keep, which now own the first slots, in their order; and what x, (B, ...), has of them."""
        kept = self.compact(rows, keep)
        if len(kept) == len(rows):
            return rows, x
        places = {row.index: place for place, row in enumerate(rows)}
        return kept, x[sent(torch.tensor([places[row.index] for row in kept], dtype=torch.long), self._device)]

    def _decode(self, keep: list[Sequence], rows: list[Sequence], tokens: Tensor) -> tuple[list[Sequence], Tensor]:
        """`_keep`, and one forward pass over the token of each row that is kept: (rows, hidden states (B, dim)).

        tokens: (B), of all rows.
        """
        rows, tokens = self._keep(keep, rows, tokens)
        if not rows:
            return rows, tokens
        start_pos = torch.tensor([row.cached for row in rows], pin_memory=self._device.type == "cuda")  # (B)
        for row in rows:
            row.cached += 1
        return rows, self.model.hidden_states(tokens[:, None].long(), start_pos)[:, -1]

    def _choose(self, logits: Tensor, live: list[Sequence], output: OutputOptions) -> Tensor:
        """The next token of each row, its logprob, and `output.top` tokens and their logprobs: (2 + 2 top, B).

        logits: (B, vocab_size). Chosen on the group's first rank, for all.
        """
        shape = 2 + 2 * output.top, len(live)
        picked = torch.zeros(shape, dtype=exact_dtype(self._device), device=self._device)  # in one message
        with together_if_foreign(live):
            if parallel.is_group_leader():
                picked[:] = told(logits, sampled(logits, live, [[]] * len(live)), output)
        return parallel.broadcast(picked)

    def _accept(self, picked: Tensor, live: list[Sequence], output: OutputOptions) -> list[Step]:
        """What `_choose` picked, now on the CPU, as the next step of each row."""
        return [self.accepted(row, told, output) for row, told in zip(live, picked.T.tolist(), strict=True)]

    def accepted(self, row: Sequence, told: abc.Sequence[float], output: OutputOptions) -> Step:
        """told: a token, its logprob, and `output.top` others and theirs."""
        token, chance, *top = told
        if token == NOT_FINITE:
            raise LlamaError(
                f"row {row.index}: the logits at position {row.position} are not finite in "
                f"{self.model.norm.weight.dtype}: the weights are damaged or this dtype overflows; try --dtype float32"
            )
        if token == NONE_LEFT:
            raise LlamaError(
                f"row {row.index}: no token is left to choose at position {row.position}: its settings forbid all of "
                "them; loosen logit_bias, no_repeat_ngram_size, min_gen_len or logits_processor"
            )
        likeliest = tuple((int(t), c) for t, c in zip(top[::2], top[1::2], strict=True)) if output.top else None
        return row.accept(int(token), chance if output.logprobs else None, likeliest)

    def compact(self, rows: list[Sequence], keep: list[Sequence]) -> list[Sequence]:
        """Let the rows to keep own the first slots of the KV cache, so that finished ones cost nothing.

        rows: in the order of their slots. The last ones to keep move into the slots of finished ones before them.
        """
        kept = {row.index for row in keep}
        movable = [slot for slot in range(len(keep), len(rows)) if rows[slot].index in kept]
        rows = list(rows)
        for slot in range(len(keep)):
            if rows[slot].index not in kept:
                source = movable.pop()
                self.model.copy_cache_row(source, slot, rows[source].cached)
                rows[slot] = rows[source]
        return rows[: len(keep)]

    def _echo(self, rows: list[Sequence], known: Mapping[tuple[int, ...], list[float]]) -> list[Step]:
        """The prompts' own tokens as steps; known: their logprobs, where asked for."""
        steps = []
        for row in sorted(rows, key=lambda row: row.index):
            texts = [row.decoder.push(token) for token in row.prompt]
            texts[-1] += row.decoder.flush()
            logprobs = known.get(tuple(row.prompt), [None] * len(row.prompt))
            steps += [Step(row.index, t, text, c) for t, text, c in zip(row.prompt, texts, logprobs, strict=True)]
        return steps

    @property
    def _device(self) -> torch.device:
        return self.model.device


def together_if_foreign(rows: list[Sequence]) -> contextlib.AbstractContextManager[None]:
    """A context in which an error of a caller's own function, on the one rank that calls it, ends all of them."""
    foreign = any(row.settings.logits_processor is not None for row in rows)
    return parallel.raise_together(parallel.group()) if foreign else contextlib.nullcontext()


def sampled(logits: Tensor, rows: list[Sequence], ahead: abc.Sequence[list[int]]) -> Tensor:
    """What each row gets next, after its answer and the tokens `ahead`: logits (B, vocab_size) -> (B)."""
    changed = [place for place, row in enumerate(rows) if row.settings.changes_logits]
    if changed:
        logits = logits.clone()
    for place in changed:
        row = rows[place]
        logits[place] = processed(logits[place], row.prompt, row.answer + ahead[place], row.settings, row.stops)
    alike: dict[tuple[object, ...], list[int]] = {}  # places of rows that are sampled together
    for place, row in enumerate(rows):
        alike.setdefault(row.settings.narrowing, []).append(place)
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for places in alike.values():
        settings, uniform = rows[places[0]].settings, None
        if settings.temperature > 0:
            draws = torch.stack([rows[place].draw(len(ahead[place])) for place in places])
            uniform = sent(draws[:, None], logits.device)  # (B, 1)
        if len(places) == len(rows):
            tokens = sample(logits, settings, uniform)
        else:
            tokens[places] = sample(logits[places], settings, uniform)
    return tokens.where((logits > NEVER).any(dim=-1), NONE_LEFT) if changed else tokens


def told(logits: Tensor, tokens: Tensor, output: OutputOptions) -> Tensor:
    """What steps tell of tokens (B) that were chosen from logits (B, vocab_size): (2 + 2 top, B).

    Tokens, their logprobs, and those of `output.top` others and theirs. NOT_FINITE is told where logits aren't.
    """
    lines = [tokens.where(logits.isfinite().all(dim=-1), NOT_FINITE)]
    lines.append(token_logprobs(logits, tokens.clamp(min=0)) if output.logprobs else torch.zeros_like(logits[:, 0]))
    if output.top:
        best = logits.topk(output.top)  # (B, top)
        chances = token_logprobs(logits[:, None].expand(-1, output.top, -1), best.indices)  # (B, top)
        lines += [line for pair in zip(best.indices.T, chances.T, strict=True) for line in pair]
    return torch.stack([line.to(exact_dtype(logits.device)) for line in lines])
