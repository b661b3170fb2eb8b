"""One step of the engine: what the scheduler planned is carried out, and each sequence is told its tokens.

A step is at most two passes, one with pieces of prompts and one that decodes; then tokens are chosen for all rows
together. Knows the model, the scheduler and the sequences that are going on; knows no thread and no caller.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from .. import parallel
from ..errors import LlamaError
from ..model import Transformer
from .agreement import call_together
from .cache_book import CacheBook
from .choices import FAILED, NONE_LEFT, NOT_FINITE, Choices, Place, choose
from .forward_pass import compute_logits, is_intercepted
from .leading import Commands
from .model_runner import PassRow, compute_prompt_logprobs, run_rows, settle
from .model_version import read_version
from .not_finite import not_finite_error
from .scheduler import Scheduler
from .sequence import ConsumeLogits, Step, read_alternatives
from .sequence import Sequence as TokenSequence
from .speculative import propose
from .step_plan import Row, SlotRelease, StepPlan
from .transfer import HostCopy, copy_to_device

MOST_TOLD = 2  # cancelled requests that the other ranks are told of in a step
SHARED = 0  # the scope of requests that share what the cache holds between calls


@dataclass
class Ahead:
    """The states of rows whose pass was started before the tokens that it feeds were read."""

    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by key and position


class Stepper:
    """What goes on in an engine: its sequences by key, the scheduler that knows them, and the model that they use."""

    def __init__(self, model: Transformer, book: CacheBook, prefill_chunk: int):
        params = model.params
        self.model = model
        self.sequences: dict[int, TokenSequence] = {}  # those that go on
        self.scheduler = Scheduler(book, params.max_batch_size, prefill_chunk, params.max_seq_len)
        self.runs_ahead = model.device.type == "cuda"  # whether a step starts before the tokens that it feeds are read
        self._most_by_hand = max(book.budget - params.max_seq_len, 0)  # so that a request always has room
        self.tells_cancelled = parallel.group().size() > 1  # whether other ranks learn from this one what was cancelled
        self._cancelled: list[int] = []  # keys that the other ranks weren't told of yet
        self._ahead = Ahead()
        self._version: object = None  # of the model that the cache was computed with

    def notice_edits(self, arriving: Sequence[TokenSequence]) -> bool:
        """Whether the model was edited since sequences last arrived, so that what it computed before is of no use."""
        if all(s.is_continued for s in arriving):
            return False
        self.model.refresh()
        if all(s.scope is None for s in arriving):  # to read the version takes as long as a short text
            return False
        version, self._version = self._version, read_version(self.model)
        return version != self._version

    @torch.no_grad()
    def is_fast(self) -> bool:
        """Whether passes run in the model's fast form."""
        fast = self.model.fast
        return fast is not None and fast.is_usable() and not is_intercepted(self.model)

    def carry_out(self, commands: Commands) -> None:
        """One step. Where it raises, all sequences are computed anew later."""
        if commands.resets:
            self.reset()
        if commands.forgets:
            self.scheduler.forget()
        for sequence in commands.arrived:
            self._add(sequence)
        self.close_scopes({s.scope for s in commands.arrived if s.scope is not None} - {SHARED, *commands.open_scopes})
        self.cancel(commands.cancelled)
        self.close_scopes(commands.closed_scopes)
        self.step(commands.waited, commands.by_hand)

    def tidy(self, commands: Commands) -> None:
        """What is cancelled and closed, where no step comes soon: the memory of slots that are free is given back."""
        self.cancel(commands.cancelled)
        self.close_scopes(commands.closed_scopes)
        self._release(self.scheduler.take_releases())

    def close_scopes(self, scopes: Iterable[int]) -> None:
        """No more sequences come in these scopes."""
        for scope in scopes:
            self.scheduler.close_scope(scope)

    def _add(self, sequence: TokenSequence) -> None:
        if sequence.remaining == 0 and not sequence.reports_prompt:
            sequence.is_over = True
            return
        if sequence.needs_twin and sequence.twin is not None and sequence.twin.key not in self.sequences:
            sequence.twin = None  # nobody reads that one
        self.sequences[sequence.key] = sequence
        self.scheduler.add(
            sequence.key,
            sequence.tokens,
            scope=sequence.scope,
            reads_all=sequence.reads_all,
            proposals=sequence.most_proposals,
            after=None if sequence.twin is None or not sequence.needs_twin else sequence.twin.key,
        )

    def cancel(self, keys: Sequence[int]) -> None:
        """These sequences get no more steps. Where all ranks make the same calls, they end when the first rank says so.

        It does with the tokens of the next step.
        """
        if self.tells_cancelled:
            self._cancelled += keys
            return
        for key in keys:
            self.end(key)

    def end(self, key: int) -> None:
        """The sequence gets no more steps; one that is over already may be named."""
        sequence = self.sequences.pop(key, None)
        if sequence is None:
            return
        sequence.is_over = True
        for copy in self.sequences.values():
            if copy.twin is sequence and copy.needs_twin:
                copy.twin = None
                self.scheduler.read_all(copy.key)
        self.scheduler.finish(key)

    @torch.no_grad()
    def step(self, wanted: Sequence[int], by_hand: int) -> None:
        """Carry out one step for the sequences with these keys. by_hand: tokens that calls by hand have cached."""
        waited = [self.sequences[key] for key in wanted if key in self.sequences]
        self.scheduler.want([s.key for s in waited])
        try:
            calls_back = any(s.settings.logits_processor is not None for s in waited)
            with settle(self.model, calls_back, look=not all(s.is_drained for s in waited)):
                self.scheduler.set_by_hand(min(by_hand, self._most_by_hand))
                plan = self.scheduler.plan()
                if waited and not plan.pieces and not plan.rows:
                    raise RuntimeError(f"the scheduler has no work for the requests {[s.key for s in waited]}")
                self._carry_out(plan)
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """What the slots hold is no longer known: all sequences are computed anew from their tokens."""
        self.scheduler.reset({key: s.tokens for key, s in self.sequences.items()})
        self._ahead = Ahead()

    # --- private: the parts of a step --------------------------------------------------------------------------------

    def _carry_out(self, plan: StepPlan) -> None:
        self._release(plan.releases)
        for copy in plan.copies:
            self.model.kv_cache.copy(copy.source, copy.target, copy.length)
        fed, states = self._read_pieces(plan)
        more_fed, more_states = self._decode(plan.rows)
        fed, states = more_fed + fed, more_states + states
        if not fed:
            return
        logits = compute_logits(self.model, torch.cat(states) if len(states) > 1 else states[0])
        n_read = sum(row.sequence.is_read for row in fed)  # at the end
        for row, own_logits in zip(fed[len(fed) - n_read :], logits[len(logits) - n_read :], strict=True):
            cast(ConsumeLogits, row.sequence.consume_logits)(own_logits)
            self.end(row.sequence.key)
        if n_read < len(fed):
            self._choose(fed[: len(fed) - n_read], states, logits[: len(logits) - n_read])

    def _choose(self, fed: Sequence[PassRow], states: Sequence[Tensor], logits: Tensor) -> None:
        """Choose tokens after rows, and after each of the proposals that they were fed; give them to the sequences.

        states: of these rows, and of more behind them. logits: (N, vocab_size), of these rows.
        """
        places = [
            Place(row.sequence, row.tokens[1 : 1 + i])
            for row, hs in zip(fed, states, strict=False)
            for i in range(len(hs))
        ]
        choices = choose(logits, places, self._cancelled[:MOST_TOLD])
        del self._cancelled[:MOST_TOLD]
        on_host = HostCopy(choices.table)
        self._ahead = self._run_ahead(fed, choices.table[0, : len(places)]) if self.runs_ahead else Ahead()
        *rows, told = on_host.wait().T.tolist()
        self._accept_all(places, choices, rows)
        for key in told[:MOST_TOLD]:
            self.end(int(key))

    def _release(self, releases: Sequence[SlotRelease]) -> None:
        for release in releases:
            self.model.kv_cache.release(release.slot, release.start)

    def _read_pieces(self, plan: StepPlan) -> tuple[list[PassRow], list[Tensor]]:
        """Pieces of texts through the model: the ends after which logits are wanted, and the states there (1, dim).

        Those that are only read come last.
        """
        if not plan.pieces:
            return [], []
        rows = [
            PassRow(s := self.sequences[piece.key], piece.slot, piece.start, s.tokens[piece.start : piece.end])
            for piece in plan.pieces
        ]
        all_states = self._read_states(rows)
        compute_prompt_logprobs(self.model, rows, all_states)
        ends: list[tuple[PassRow, Tensor]] = []
        for piece, row, h in zip(plan.pieces, rows, all_states, strict=True):
            s = row.sequence
            if not s.answer:
                s.hit = self.scheduler.hit(s.key)
            if s.consume is not None:
                s.consume(piece.start, h)
            if not piece.is_last:
                continue
            if s.output.echo and not s.is_read and not s.is_echoed:
                s.is_echoed = True  # a step that fails later is computed again, and this is told already
                s.steps.extend(s.echo())
            if s.remaining == 0 and s.consume_logits is None:
                self.end(s.key)
                continue
            ends.append((PassRow(s, piece.slot, piece.end - 1, row.tokens[-1:]), h[-1:]))
        ends.sort(key=lambda end: end[0].sequence.is_read)
        return [row for row, _ in ends], [h for _, h in ends]

    def _read_states(self, rows: list[PassRow]) -> list[Tensor]:
        """The states of rows. Those that are a caller's result are no logits, whatever was done to the forward."""
        readers = [i for i, row in enumerate(rows) if row.sequence.consume is not None]
        if not readers or not is_intercepted(self.model):
            return run_rows(self.model, rows)
        others = [i for i in range(len(rows)) if i not in readers]
        states = run_rows(self.model, [rows[i] for i in readers], None, Transformer.hidden_states)
        if others:
            states += run_rows(self.model, [rows[i] for i in others])
        by_place = dict(zip(readers + others, states, strict=True))
        return [by_place[i] for i in range(len(rows))]

    def _decode(self, rows: Sequence[Row]) -> tuple[list[PassRow], list[Tensor]]:
        """The last tokens of sequences, and proposals after them, through the model: states (1 + proposed, dim)."""
        sequences = [self.sequences[row.key] for row in rows]
        limits = [min(row.count, s.remaining) - 1 for row, s in zip(rows, sequences, strict=True)]
        fed = [
            PassRow(s, row.slot, row.start, [s.answer[-1], *proposals])
            for row, s, proposals in zip(rows, sequences, propose(sequences, limits), strict=True)
        ]
        known = self._ahead.states
        new = [row for row in fed if len(row.tokens) > 1 or (row.sequence.key, row.start) not in known]
        computed = dict(zip((row.sequence.key for row in new), run_rows(self.model, new) if new else (), strict=True))
        states = [computed.get(row.sequence.key, known.get((row.sequence.key, row.start))) for row in fed]
        return fed, cast(list[Tensor], states)

    def _run_ahead(self, fed: Sequence[PassRow], tokens: Tensor) -> Ahead:
        """Start the pass that decodes in the next step; some of its rows may turn out to stop now.

        tokens: those just chosen, of all rows.
        """
        if any(row.sequence.most_proposals for row in fed):
            return Ahead()
        going = [i for i, row in enumerate(fed) if row.sequence.remaining > 1]
        rows = [PassRow(fed[i].sequence, fed[i].slot, fed[i].start + 1, [0]) for i in going]  # of tokens on the device
        if not rows:
            return Ahead()
        if len(rows) < len(fed):
            tokens = tokens[copy_to_device(torch.tensor(going), tokens.device)]
        states = run_rows(self.model, rows, tokens.long())
        return Ahead({(row.sequence.key, row.start): h for row, h in zip(rows, states, strict=True)})

    def _accept_all(self, places: Sequence[Place], choices: Choices, rows: Sequence[Sequence[float]]) -> None:
        """Give the sequences their tokens: of several places of one, up to the first that differs from its proposal."""
        failures = choices.share_failures(rows)
        accepted: dict[int, list[int]] = {}
        proposed: dict[int, Sequence[int]] = {place.sequence.key: place.proposals for place in places}
        for i, (place, row) in enumerate(zip(places, rows, strict=True)):
            s = place.sequence
            tokens = accepted.setdefault(s.key, [])
            if s.finish_reason is not None or s.error is not None or tokens != list(place.proposals):
                continue
            if (error := self._find_error(s, int(row[0]), failures.get(i), choices.failures.get(i))) is not None:
                s.error = error
                continue
            s.steps.append(accept(s, row))
            tokens.append(int(row[0]))
        for key, tokens in accepted.items():
            s = self.sequences[key]
            s.proposed += len(proposed[key])
            s.accepted += max(len(tokens) - 1, 0)
            if tokens:
                self.scheduler.extend(key, tokens)
            if s.finish_reason is not None or s.error is not None:
                self.end(key)

    def _find_error(
        self, s: TokenSequence, token: int, failure: str | None, cause: Exception | None
    ) -> Exception | None:
        """Why no token could be chosen after a sequence, if none could."""
        if token == NOT_FINITE:
            return not_finite_error(
                self.model, call_together, f"row {s.index}: the logits at position {s.position} are"
            )
        if token == NONE_LEFT:
            return LlamaError(
                f"row {s.index}: no token is left to choose at position {s.position}: its settings "
                "forbid all of them; loosen logit_bias, no_repeat_ngram_size, min_gen_len, logits_processor or "
                "response_format"
            )
        if token == FAILED:
            error = LlamaError(f"row {s.index}: {failure}")
            error.__cause__ = cause
            return error
        return None


def accept(sequence: TokenSequence, choice: Sequence[float]) -> Step:
    """The step that a choice makes, a column of `describe_choices`."""
    token, logprob, *top = choice
    likeliest = read_alternatives(top, sequence.output.top)
    return sequence.accept(int(token), logprob if sequence.output.logprobs else None, likeliest)
