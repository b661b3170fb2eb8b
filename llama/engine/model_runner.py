"""The one loop of generation: sequences go through the model together, a token at a time, each until its own end.

`ModelRunner.run` is the loop. Its parts `begin`, `check_owner`, `compact` and `accept` serve `speculative.py` too.
Knows the model, its KV cache, and which sequence has which of the cache's slots; knows no text and no file.
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
from ..sampling import NEVER, Context, apply_logits_processors, sample, token_logprobs
from .scheduler import prefill
from .sequence import Sequence, Step
from .transfer import HostCopy, copy_to_device, exact_dtype

NOT_FINITE, NONE_LEFT = -1, -2  # in the place of a token that could not be chosen


@dataclass(frozen=True)
class OutputOptions:
    """What the steps of a stream report."""

    logprobs: bool = False
    echo: bool = False  # the prompts' own tokens first
    top: int = 0  # how many of the likeliest tokens


@contextlib.contextmanager
def settle(model: Transformer, calls_back: bool) -> Iterator[None]:
    """Look for edits of the model once, and not at each step, unless a caller's function is called in between."""
    model.refresh()
    if model.fast is None or calls_back:
        yield
        return
    model.fast.is_settled = True
    try:
        yield
    finally:
        if model.fast is not None:
            model.fast.is_settled = False


class ModelRunner:
    """Runs sequences through a model. It has one KV cache, so one stream at a time: a newer one ends an older one."""

    def __init__(self, model: Transformer, prefill_chunk: int):
        self.model = model
        self.prefill_chunk = prefill_chunk  # tokens of prompts in one forward pass
        self.cache_owner: object = None  # the ticket of the stream that owns the KV cache
        self.ahead = model.device.type == "cuda"  # whether to start a step before the tokens that it feeds are read
        self.proposed = 0  # tokens that the last stream proposed (see speculative.py)
        self.accepted = 0  # those of them that the model chose

    @torch.no_grad()
    def run(self, sequences: list[Sequence], output: OutputOptions, cached: int = 0) -> Iterator[list[Step]]:
        """Yield after every forward pass one step of each live sequence; with echo, first those of the prompts.

        Sequences with the same prompt share its prefill. cached: for a single sequence, how many tokens of its prompt
        its slot already holds.
        """
        ticket, live, h = yield from self.begin(sequences, output, cached)
        while live:
            choices = self._choose(self.model.logits(h), live, output)
            host_choices, next_live = HostCopy(choices), live
            if self.ahead:
                # Start the next step. It includes sequences that turn out to stop now, whose part is then wasted, but
                # not those that are at their last token.
                next_live, h = self._decode([s for s in live if s.remaining > 1], live, choices[0])
            steps = self._accept_all(host_choices.wait(), live, output)
            yield sorted(steps, key=lambda step: step.row)
            unfinished = [s for s in live if s.finish_reason is None]
            if not unfinished:
                return
            self.check_owner(ticket)
            if self.ahead:
                live, h = self._keep(unfinished, next_live, h)
            else:
                live, h = self._decode(unfinished, live, choices[0])

    def begin(
        self, sequences: list[Sequence], output: OutputOptions, cached: int = 0
    ) -> Generator[list[Step], None, tuple[object, list[Sequence], Tensor]]:
        """Prefill, and yield the prompts' steps where `output` asks for them.

        Returns the stream's ticket for `check_owner`; the sequences with room for an answer, in the order of their
        slots; and the hidden states of their last tokens (B, dim).
        """
        ticket = self.claim_cache()
        self.proposed = self.accepted = 0
        sequences, h, logprobs = self._prefill(sequences, output, cached)
        if output.echo:
            yield self._echo(sequences, logprobs)
            self.check_owner(ticket)
        return ticket, *self._keep([s for s in sequences if s.remaining > 0], sequences, h)

    def claim_cache(self) -> object:
        """Take the KV cache from the stream that owns it, which is over; returns the new owner's ticket."""
        self.model.refresh()
        self.cache_owner = object()
        return self.cache_owner

    def check_owner(self, ticket: object) -> None:
        """Raise LlamaError if another stream owns the KV cache.

        Call it after each yield, before the cache is touched: the caller may have started another stream.
        """
        if self.cache_owner is not ticket:
            raise LlamaError("this stream was ended by a newer call on the same Llama: use one at a time")

    def accept(self, sequence: Sequence, choice: abc.Sequence[float], output: OutputOptions) -> Step:
        """The step that a choice makes, a column of `describe_choices`. Raises LlamaError where there is no token."""
        token, logprob, *top = choice
        if token == NOT_FINITE:
            raise LlamaError(
                f"row {sequence.index}: the logits at position {sequence.position} are not finite in "
                f"{self.model.dtype}: the weights are damaged or this dtype overflows; try --dtype float32"
            )
        if token == NONE_LEFT:
            raise LlamaError(
                f"row {sequence.index}: no token is left to choose at position {sequence.position}: its settings "
                "forbid all of them; loosen logit_bias, no_repeat_ngram_size, min_gen_len or logits_processor"
            )
        likeliest = tuple((int(t), p) for t, p in zip(top[::2], top[1::2], strict=True)) if output.top else None
        return sequence.accept(int(token), logprob if output.logprobs else None, likeliest)

    def compact(self, sequences: list[Sequence], keep: list[Sequence]) -> list[Sequence]:
        """Move the sequences to keep into the first slots of the KV cache, so that finished ones cost nothing.

        sequences: in the order of their slots. Returns those to keep in the order of theirs: the last ones have moved
        into the slots of finished ones.
        """
        kept = {s.index for s in keep}
        movable = [slot for slot in range(len(keep), len(sequences)) if sequences[slot].index in kept]
        sequences = list(sequences)
        for slot in range(len(keep)):
            if sequences[slot].index not in kept:
                source = movable.pop()
                self.model.copy_cache_slot(source, slot, sequences[source].cached)
                sequences[slot] = sequences[source]
        return sequences[: len(keep)]

    # --- private: the parts of `run` alone -------------------------------------------------------------------------

    def _prefill(
        self, sequences: list[Sequence], output: OutputOptions, cached: int
    ) -> tuple[list[Sequence], Tensor, Mapping[tuple[int, ...], list[float]]]:
        """Read each different prompt once, and copy its cache for the other sequences that have it.

        Returns the sequences in the order of their slots, the hidden states of their last tokens (B, dim), and the
        logprobs of each prompt's tokens, where `output` asks for them.
        """
        owners = {tuple(s.prompt): s for s in reversed(sequences)}
        firsts = sorted(owners.values(), key=lambda s: (-s.position, s.index))  # the longest prompt has the first slot
        prompts = [s.prompt for s in firsts]
        h, logprobs = prefill(self.model, prompts, self.prefill_chunk, output.echo and output.logprobs, cached)
        slots = {tuple(prompt): slot for slot, prompt in enumerate(prompts)}
        others = [s for s in sequences if owners[tuple(s.prompt)] is not s]
        for slot, s in enumerate(others, len(firsts)):
            self.model.copy_cache_slot(slots[tuple(s.prompt)], slot, s.position)
        sequences = firsts + others
        if others:
            h = h[[slots[tuple(s.prompt)] for s in sequences]]
        return sequences, h, dict(zip(slots, logprobs or (), strict=False))

    def _keep(self, keep: list[Sequence], sequences: list[Sequence], x: Tensor) -> tuple[list[Sequence], Tensor]:
        """`compact`, and the same selection of x (B, ...), which is in the order of `sequences`."""
        kept = self.compact(sequences, keep)
        if len(kept) == len(sequences):
            return sequences, x
        places = {s.index: place for place, s in enumerate(sequences)}
        selected = torch.tensor([places[s.index] for s in kept], dtype=torch.long)
        return kept, x[copy_to_device(selected, self.model.device)]

    def _decode(self, keep: list[Sequence], sequences: list[Sequence], tokens: Tensor) -> tuple[list[Sequence], Tensor]:
        """`_keep`, and one forward pass over the kept sequences' tokens: hidden states (B, dim).

        tokens: (B), of all sequences.
        """
        sequences, tokens = self._keep(keep, sequences, tokens)
        if not sequences:
            return sequences, tokens
        start_pos = torch.tensor([s.cached for s in sequences], pin_memory=self.model.device.type == "cuda")  # (B)
        for s in sequences:
            s.cached += 1
        return sequences, self.model.hidden_states(tokens[:, None].long(), start_pos)[:, -1]

    def _choose(self, logits: Tensor, live: list[Sequence], output: OutputOptions) -> Tensor:
        """The next token of each sequence, as `describe_choices` gives it: (2 + 2 top, B).

        logits: (B, vocab_size). The first rank of the model-parallel group chooses for all, in one message.
        """
        shape = 2 + 2 * output.top, len(live)
        choices = torch.zeros(shape, dtype=exact_dtype(logits.device), device=logits.device)
        with share_processor_errors(live):
            if parallel.is_group_leader():
                choices[:] = describe_choices(logits, choose_tokens(logits, live, [[]] * len(live)), output)
        return parallel.broadcast(choices)

    def _accept_all(self, choices: Tensor, live: list[Sequence], output: OutputOptions) -> list[Step]:
        """The steps that `_choose`'s result, copied to the CPU, makes."""
        return [self.accept(s, choice, output) for s, choice in zip(live, choices.T.tolist(), strict=True)]

    def _echo(self, sequences: list[Sequence], logprobs: Mapping[tuple[int, ...], list[float]]) -> list[Step]:
        """The prompts' own tokens as steps. logprobs: of the prompts that have some."""
        steps = []
        for s in sorted(sequences, key=lambda s: s.index):
            texts = [s.decoder.push(token) for token in s.prompt]
            texts[-1] += s.decoder.flush()
            prompt_logprobs = logprobs.get(tuple(s.prompt), [None] * len(s.prompt))
            steps += [Step(s.index, t, text, p) for t, text, p in zip(s.prompt, texts, prompt_logprobs, strict=True)]
        return steps


def share_processor_errors(sequences: list[Sequence]) -> contextlib.AbstractContextManager[None]:
    """Raise an error of a caller's `logits_processor`, which one rank alone calls, on all ranks of the group."""
    has_processor = any(s.settings.logits_processor is not None for s in sequences)
    return parallel.raise_together(parallel.group()) if has_processor else contextlib.nullcontext()


def choose_tokens(logits: Tensor, sequences: list[Sequence], proposals: abc.Sequence[list[int]]) -> Tensor:
    """What each sequence gets after its answer and its proposals: logits (B, vocab_size) -> tokens (B)."""
    changed = [place for place, s in enumerate(sequences) if s.settings.changes_logits]
    if changed:
        logits = logits.clone()
    for place in changed:
        s = sequences[place]
        context = Context(s.prompt, s.answer + proposals[place], s.stops)
        logits[place] = apply_logits_processors(logits[place], s.settings, context)
    groups: dict[tuple[object, ...], list[int]] = {}  # places of sequences that are sampled together
    for place, s in enumerate(sequences):
        groups.setdefault(s.settings.narrowing, []).append(place)
    tokens = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    for places in groups.values():
        settings, uniform = sequences[places[0]].settings, None
        if settings.temperature > 0:
            draws = torch.stack([sequences[place].draw(len(proposals[place])) for place in places])
            uniform = copy_to_device(draws[:, None], logits.device)  # (B, 1)
        if len(places) == len(sequences):
            tokens = sample(logits, settings, uniform)
        else:
            tokens[places] = sample(logits[places], settings, uniform)
    return tokens.where((logits > NEVER).any(dim=-1), NONE_LEFT) if changed else tokens


def describe_choices(logits: Tensor, tokens: Tensor, output: OutputOptions) -> Tensor:
    """What steps report of tokens (B) that were chosen from logits (B, vocab_size): (2 + 2 top, B).

    The tokens, or NOT_FINITE where logits aren't; their logprobs, or 0 where `output` doesn't ask for them; then by
    turns one of the `output.top` likeliest tokens and its logprob.
    """
    lines = [tokens.where(logits.isfinite().all(dim=-1), NOT_FINITE)]
    lines.append(token_logprobs(logits, tokens.clamp(min=0)) if output.logprobs else torch.zeros_like(logits[:, 0]))
    if output.top:
        best = logits.topk(output.top)  # (B, top)
        logprobs = token_logprobs(logits[:, None].expand(-1, output.top, -1), best.indices)  # (B, top)
        lines += [line for pair in zip(best.indices.T, logprobs.T, strict=True) for line in pair]
    return torch.stack([line.to(exact_dtype(logits.device)) for line in lines])
