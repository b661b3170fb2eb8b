"""The engine: requests to a model come and go between two steps, and whoever waits for one runs the steps of all.

All that generates goes through `Engine.make_requests`, and all that only reads, beams too, through `Engine.read`. Knows
the model and the tokenizer; knows no file and no dialog.
"""

import contextlib
import threading
from collections import Counter, abc, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from .. import parallel
from .._util.interrupt import hold_interrupt
from .._util.validate import check_count
from ..errors import LlamaError
from ..model import Transformer
from ..settings import Settings, settings_of_rows
from ..tokenization.protocol import AnyTokenizer
from .cache_book import CacheBook
from .request import Request
from .request_checks import check_budget, check_prompts, check_speculation, check_token_ids
from .seeds import SequenceSeeds
from .sequence import Consume, ConsumeLogits, OutputOptions, Sequence, Step
from .speculative import SPECULATE_K, DraftProposer, make_lookup_proposer
from .stepper import SHARED, Stepper
from .stop_strings import StopFinder

PLAIN_OUTPUT = OutputOptions()
SLOTS_PER_ROW = 4  # slots of the cache for each row of a pass, where unused ones take no memory


@dataclass(frozen=True)
class CallOptions:
    """How all requests of a call are answered."""

    output: OutputOptions = PLAIN_OUTPUT
    n: int = 1  # requests to each prompt
    lookup_ngram: int | None = None
    speculate_k: int = SPECULATE_K
    reuse: bool = False  # whether to use what earlier calls left in the cache, and to leave something to later ones
    in_order: bool = False  # whether rows of passes are in the order of the prompts
    is_drained: bool = False  # whether the caller does nothing until all are answered


class Engine:
    """What a `Llama` generates with. It may be used from several threads; on several ranks, every rank makes the same
    calls, from one thread.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        seed: int,
        prefill_chunk: int,
        draft: Transformer | None,
        cache_tokens: int | None = None,
    ):
        """cache_tokens: that the KV cache holds at most; None: max_batch_size times max_seq_len."""
        params = model.params
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk  # tokens of prompts in one forward pass
        self.cache_tokens = cache_tokens or params.max_batch_size * params.max_seq_len
        self.n_slots = SLOTS_PER_ROW * params.max_batch_size
        if model.device.type != "cpu":  # where slots take their memory at once
            self.n_slots = max(min(self.n_slots, self.cache_tokens // params.max_seq_len), 1)
        self.stepper = Stepper(model, CacheBook(self.n_slots, self.cache_tokens), prefill_chunk)
        self.last_call: list[Sequence] = []  # the sequences of the last call
        self._draft_proposer = None if draft is None else DraftProposer(draft, prefill_chunk)
        self._seeds = SequenceSeeds(seed)
        self._keys, self._scopes = count(1), count(SHARED + 1)
        self._turn = threading.Condition()  # guards what follows
        self._runner: int | None = None  # the thread that runs a step now
        self._waited: Counter[int] = Counter()  # by key: callers that wait for a step
        self._arrived: deque[Sequence] = deque()  # since the last step
        self._cancelled: deque[Sequence] = deque()  # since the last step; appended to without a lock, at any moment
        self._open_scopes: set[int] = set()  # those that get more sequences
        self._closed_scopes: list[int] = []  # since the last step
        self._thread: int | None = None  # that uses the engine, on several ranks
        if model.fast is not None:
            with model.kv_cache.lock:
                self._claim_slots()
                model.fast.warm_up()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: abc.Sequence[int],
        output: OutputOptions | None = None,
        *,
        prefix_cache: bool = True,
        **settings: Any,
    ) -> Request:
        """A request for one answer, to be iterated over. settings: see `Settings`. Raises LlamaError.

        prefix_cache: whether to begin at the longest prefix that the cache holds, and to leave this one to others.
        """
        options = CallOptions(output or OutputOptions(), reuse=prefix_cache)
        return self.make_requests([prompt_tokens], settings, None, options)[0]

    def make_requests(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        shared: Mapping[str, Any],
        rows: abc.Sequence[Mapping[str, Any] | None] | None,
        options: CallOptions,
    ) -> list[Request]:
        """n requests for each prompt. shared: settings of all; rows: those of each. Raises LlamaError."""
        with parallel.raise_together(parallel.group()):
            check_count("n", options.n)
            check_prompts(prompt_tokens, self.model.params)
            all_settings = settings_of_rows(len(prompt_tokens), shared, rows)
            check_token_ids(all_settings, options.output.top, self.model.params.vocab_size)
            check_speculation(options.lookup_ngram, options.speculate_k)
            check_budget(prompt_tokens, all_settings, self.model.params.max_seq_len, self.cache_tokens)
        prompts = [[int(token) for token in prompt] for prompt in prompt_tokens]
        with self._turn:
            scope = self._choose_scope(options.reuse)
            pairs = enumerate(zip(prompts, all_settings, strict=True))
            sequences = [
                self._make_sequence(i * options.n + j, pair, j, scope, options)
                for i, pair in pairs
                for j in range(options.n)
            ]
        firsts: dict[tuple[int, ...], Sequence] = {}
        for s in sequences:
            first = firsts.setdefault(tuple(s.prompt), s)
            s.twin = None if first is s or s.scope is None else first
        return [Request(self, s) for s in sequences]

    def read(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Those that are to be read and get no answer, each as soon as it was read."""
        live = list(sequences)
        try:
            while live:
                self.wait_any(live)
                yield from [s for s in live if s.is_over]
                live = [s for s in live if not s.is_over]
        finally:
            for s in live:
                self.cancel(s)

    def make_reading(
        self,
        index: int,
        prompt: list[int],
        answer: abc.Sequence[int] = (),
        scope: int | None = None,
        *,
        first: int | None = None,
        consume: Consume | None = None,
        consume_logits: ConsumeLogits | None = None,
    ) -> Sequence:
        """A sequence that is read and gets no further token. scope: one of `open_scopes`; None: it shares nothing.

        first: the first token of the prompt whose logprob is wanted; None: none is. consume, consume_logits: as in
        `Sequence`.
        """
        wanted = OutputOptions(logprobs=first is not None, echo=first is not None)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=Settings(),
            stops=frozenset(),
            remaining=0,
            decoder=self.tokenizer.stream_decoder(),
            generator=torch.Generator(),
            stop_finder=StopFinder(()),
            output=wanted,
            scope=scope,
            first=first or 1,
            is_read=True,
            consume=consume,
            consume_logits=consume_logits,
            is_drained=True,
            answer=list(answer),
        )

    def open_scopes(self, count: int) -> list[int]:
        """For each of so many prompts, what its texts share in the KV cache until `close_scopes`: equal ones share it.

        With `dynamic` rotary scaling only texts of one prompt have the same angles.
        """
        with self._turn:
            scopes = [next(self._scopes) for _ in range(count)]
            scopes = scopes if self._is_dynamic else scopes[:1] * count
            self._open_scopes.update(scopes)
        return scopes

    def close_scopes(self, scopes: list[int]) -> None:
        """What texts of these scopes have left in the KV cache goes with the next step."""
        with self._turn:
            self._open_scopes.difference_update(scopes)
            self._closed_scopes += set(scopes)
        self._tidy()

    def stop_tokens(self, settings: Settings) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokenizer.stop_tokens) | {*settings.stop_token_ids}

    def stream(self, requests: list[Request]) -> Iterator[list[Step]]:
        """The steps of requests, in lists of those that are there at a time, in the order of their rows.

        With echo, the first list holds the prompts' own tokens. Raises LlamaError at the end for those that failed.
        """
        self.last_call = sequences = [request.sequence for request in requests]
        try:
            yield from self._stream(requests)
        finally:
            for request in requests:
                request.cancel()
            self._tidy()
        raise_failures(sequences)

    def _stream(self, requests: list[Request]) -> Iterator[list[Step]]:
        live = list(requests)
        echoed = not requests[0].sequence.output.echo
        while live:
            sequences = [request.sequence for request in live]
            if echoed:
                self.wait_any(sequences)
            else:
                self.wait_all(sequences)
                steps = [s.steps.popleft() for s in sequences for _ in range(len(s.prompt)) if s.steps]
                echoed = True
                yield steps
            if steps := [step for request in live for step in request.take()]:
                yield steps
            live = [request for request in live if not request.is_over]

    def cancel(self, sequence: Sequence) -> None:
        """The sequence gets no more steps. May be called at any moment, by the garbage collector too."""
        sequence.is_over = True
        self._cancelled.append(sequence)

    # --- steps --------------------------------------------------------------------------------------------------------

    def wait_any(self, sequences: list[Sequence]) -> None:
        """Run steps until one of these sequences, at least one of them, has one for its caller, or is over."""
        self._wait(sequences, any)

    def wait_all(self, sequences: list[Sequence]) -> None:
        """Run steps until each of these sequences has one for its caller, or is over."""
        self._wait(sequences, all)

    def _wait(self, sequences: list[Sequence], enough: abc.Callable[[abc.Iterable[bool]], bool]) -> None:
        self._check_thread()
        with self._turn:
            for s in sequences:
                if not s.key and not s.is_over:
                    s.key = next(self._keys)
                    self._arrived.append(s)
            self._waited.update(s.key for s in sequences)
            try:
                while not enough(bool(s.steps) or s.is_over for s in sequences):
                    if self._runner is not None:
                        self._turn.wait()
                    else:
                        self._run_step()
            finally:
                self._waited.subtract(s.key for s in sequences)
                self._waited += Counter()  # forgets those that nobody waits for

    def _run_step(self) -> None:
        """One step, without holding back other threads that want to say something. Called with `_turn`."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        cancelled = [self._cancelled.popleft().key for _ in range(len(self._cancelled))]
        closed, self._closed_scopes = self._closed_scopes, []
        waited = list(self._waited)
        with hold_interrupt(), self._busy():
            if self._claim_slots():
                self.stepper.reset()
            if arrived:
                self.stepper.add_all(arrived, self._open_scopes)
            self.stepper.cancel(cancelled)
            self.stepper.close_scopes(closed)
            self.stepper.step(waited)

    def _tidy(self) -> None:
        """End what was cancelled, and give back its memory, unless the next step is to do so."""
        with self._turn:
            if self._runner is not None or parallel.group().size() > 1 or self.model.kv_cache.owner is not self:
                return
            self.stepper.cancel([self._cancelled.popleft().key for _ in range(len(self._cancelled))])
            self.stepper.close_scopes(self._closed_scopes)
            self._closed_scopes = []
            self.stepper.give_back()

    def _claim_slots(self) -> bool:
        """Make the model's slots this engine's. Returns whether they hold nothing that it wrote."""
        return self.model.kv_cache.claim(self, self.n_slots, self.model.dtype, self.model.device)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """The model is this thread's, while others may go on with all else. Called with `_turn`."""
        self._runner = threading.get_ident()
        self._turn.release()
        try:
            with self.model.kv_cache.lock:
                yield
        finally:
            self._turn.acquire()
            self._runner = None
            self._turn.notify_all()

    # --- private ------------------------------------------------------------------------------------------------------

    def _make_sequence(
        self,
        index: int,
        prompt_and_settings: tuple[list[int], Settings],
        copy: int,
        scope: int | None,
        options: CallOptions,
    ) -> Sequence:
        """copy: its number among the sequences of this prompt."""
        prompt, settings = prompt_and_settings
        room = self.model.params.max_seq_len - len(prompt)
        ngram = options.lookup_ngram
        proposer = self._draft_proposer if ngram is None else make_lookup_proposer(ngram)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=settings,
            stops=self.stop_tokens(settings),
            remaining=room if settings.max_gen_len is None else min(room, settings.max_gen_len),
            decoder=self.tokenizer.stream_decoder(),
            generator=self._seeds.make_generator(prompt, settings.seed, copy),
            stop_finder=StopFinder(settings.stop),
            output=options.output,
            scope=scope,
            proposer=proposer,
            most_proposals=options.speculate_k if proposer is not None else 0,
            in_order=options.in_order,
            is_drained=options.is_drained,
        )

    def _choose_scope(self, reuse: bool) -> int | None:
        """Which requests those of a call share prefixes with. None with `dynamic` rotary scaling.

        There the angles in the cache depend on the length of the text that they were computed for.
        """
        if self._is_dynamic:
            return None
        return SHARED if reuse else next(self._scopes)

    @property
    def _is_dynamic(self) -> bool:
        scaling = self.model.params.rope_scaling
        return scaling is not None and scaling.type == "dynamic"

    def _check_thread(self) -> None:
        """Raise LlamaError for a call within a step, which would wait for itself, and for a second thread on ranks."""
        if self._runner == threading.get_ident():
            raise LlamaError(
                "a hook or a logits processor made a call to the Llama whose step calls it: call the model itself "
                "there, or make the call before or after"
            )
        if parallel.group().size() == 1:
            return
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise LlamaError(
                "a second thread uses a model on several ranks, where calls of threads come in another order on each: "
                "make all calls from one thread"
            )


def raise_failures(sequences: list[Sequence]) -> None:
    """Raise one LlamaError for all sequences that failed, if any did."""
    failed = [s for s in sequences if s.error is not None]
    if not failed:
        return
    first = failed[0].error
    if len(failed) == 1 and first is not None:
        raise first
    lines = "; ".join(str(s.error) for s in failed)
    raise LlamaError(f"{len(failed)} of {len(sequences)} answers failed: {lines}") from first
