"""The engine: requests to a model come and go between two steps, and whoever waits for one runs the steps of all.

All that generates goes through `Engine.make_requests`, and all that only reads, beams too, through `Engine.read`. Knows
the model and the tokenizer; knows no file and no dialog.
"""

import contextlib
import threading
from collections import Counter, abc, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, cast

from .. import parallel
from .._util.interrupt import hold_interrupt
from .._util.validate import check_count
from ..errors import LlamaError
from ..model import Transformer
from ..settings import settings_of_rows
from ..tokenization.protocol import AnyTokenizer
from .cache_book import CacheBook
from .forward_pass import find_cache_dtype, is_dynamic
from .leading import Arrival, Channel, Commands, Farewell
from .rank_groups import call_together, long_timeout_group
from .request import Request, raise_failures
from .request_checks import check_budget, check_prompts, check_speculation, check_token_ids
from .sequence import OutputOptions, Sequence, Step
from .sequence_maker import CallOptions, SequenceMaker
from .serving import Server
from .speculative import DraftProposer
from .stepper import SHARED, Stepper

SLOTS_PER_ROW = 4  # slots of the cache for each row of a pass, where unused ones take no memory


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
        self.maker = SequenceMaker(
            params, tokenizer, seed, None if draft is None else DraftProposer(draft, prefill_chunk)
        )
        self._keys, self._scopes = count(1), count(SHARED + 1)
        self._turn = threading.Condition()  # guards what follows
        self._runner: int | None = None  # the thread that runs a step now
        self._waited: Counter[int] = Counter()  # by key: callers that wait for a step
        self._arrived: deque[Sequence] = deque()  # since the last step
        self._cancelled: deque[Sequence] = deque()  # since the last step; appended to without a lock, at any moment
        self._open_scopes: set[int] = set()  # those that get more sequences
        self._closed_scopes: list[int] = []  # since the last step
        self._thread: int | None = None  # that uses the engine, on several ranks
        self._channel: Channel | None = None  # to the ranks that follow this one
        self._has_failed = False  # whether the last step raised an error
        self._server: Server | None = None
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
        notify: abc.Callable[[], object] | None = None,
        **settings: Any,
    ) -> Request:
        """A request for one answer, to be iterated over. settings: see `Settings`. Raises LlamaError.

        prefix_cache: whether to begin at the longest prefix that the cache holds, and to leave this one to others.
        notify: within `serve`, called by the engine's thread whenever there are new steps, and at the end.
        """
        options = CallOptions(output or OutputOptions(), reuse=prefix_cache, notify=notify)
        return self.make_requests([prompt_tokens], settings, None, options)[0]

    def make_requests(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        shared: Mapping[str, Any],
        rows: abc.Sequence[Mapping[str, Any] | None] | None,
        options: CallOptions,
    ) -> list[Request]:
        """n requests for each prompt. shared: settings of all; rows: those of each. Raises LlamaError."""
        with self.together("stream", prompts=prompt_tokens, settings=(shared, rows), options=options):
            check_count("n", options.n)
            check_prompts(prompt_tokens, self.model.params)
            all_settings = settings_of_rows(len(prompt_tokens), shared, rows)
            check_token_ids(all_settings, options.output.top, self.model.params.vocab_size)
            check_speculation(options.lookup_ngram, options.speculate_k)
            check_budget(prompt_tokens, all_settings, self.model.params.max_seq_len, self.cache_tokens)
        with self._turn:
            scope = self._choose_scope(options.reuse)
            sequences = self.maker.make_sequences(prompt_tokens, all_settings, scope, options)
            if self._server is not None:
                self._welcome(sequences)
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
            self._tidy()

    def open_scopes(self, count: int) -> list[int]:
        """For each of so many prompts, what its texts share in the KV cache until `close_scopes`: equal ones share it.

        With `dynamic` rotary scaling only texts of one prompt have the same angles.
        """
        with self._turn:
            scopes = [next(self._scopes) for _ in range(count)]
            scopes = scopes if is_dynamic(self.model) else scopes[:1] * count
            self._open_scopes.update(scopes)
        return scopes

    def close_scopes(self, scopes: list[int]) -> None:
        """What texts of these scopes have left in the KV cache goes with the next step."""
        with self._turn:
            self._open_scopes.difference_update(scopes)
            self._closed_scopes += set(scopes)
        self._tidy()

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
            self._welcome(sequences)
            self._waited.update(s.key for s in sequences)
            try:
                while not enough(bool(s.steps) or s.is_over for s in sequences):
                    if self._runner is not None or self._server is not None:
                        self._turn.wait()
                    else:
                        self._run_step(list(self._waited))
            finally:
                self._waited.subtract(s.key for s in sequences)
                self._waited += Counter()  # forgets those that nobody waits for

    def _welcome(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences are waited for, some for the first time. Called with `_turn`."""
        new = [s for s in sequences if not s.key and not s.is_over]
        for s in new:
            s.key = next(self._keys)
        self._arrived += new
        if self._server is not None and new:
            self._server.add(new)
            self._turn.notify_all()

    def _run_step(self, waited: list[int]) -> None:
        """One step, without holding back other threads that want to say something. Called with `_turn`."""
        commands = Commands(
            waited=waited,
            arrived=[self._arrived.popleft() for _ in range(len(self._arrived))],
            cancelled=[self._cancelled.popleft().key for _ in range(len(self._cancelled))],
            closed_scopes=self._closed_scopes,
            open_scopes=frozenset(self._open_scopes),
            by_hand=self.model.kv_cache.by_hand,
            has_failed=self._has_failed,
        )
        self._closed_scopes, self._has_failed = [], False
        with hold_interrupt(), self._busy():
            forgets = self.stepper.notice_edits(commands.arrived)
            commands = replace(commands, resets=self._claim_slots(), forgets=forgets)
            if self._channel is not None:
                self._channel.send(commands)
            try:
                self.stepper.carry_out(commands)
            except BaseException:
                self._has_failed = True
                raise

    def _tidy(self) -> None:
        """End what was cancelled, and give back its memory, unless the next step is to do so."""
        with self._turn:
            if self._runner is not None or self.model.kv_cache.owner is not self:
                return
            if parallel.group().size() > 1:
                if self.is_leading and (self._cancelled or self._closed_scopes):
                    self._run_step([])  # the others are to do the same
                return
            cancelled = [self._cancelled.popleft().key for _ in range(len(self._cancelled))]
            self.stepper.tidy(Commands((), cancelled=cancelled, closed_scopes=self._closed_scopes))
            self._closed_scopes = []

    def _claim_slots(self) -> bool:
        """Make the model's slots this engine's. Returns whether they hold nothing that it wrote."""
        return self.model.kv_cache.claim(self, self.n_slots, find_cache_dtype(self.model), self.model.device)

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

    # --- ranks, and a thread of its own -------------------------------------------------------------------------------

    @property
    def is_leading(self) -> bool:
        """Whether this rank submits alone, and the others follow."""
        return self._channel is not None

    def together(self, call: str, **arguments: object) -> contextlib.AbstractContextManager[None]:
        """A context for the checks of a call, which fail on all ranks alike.

        call, arguments: what has to be the same on all ranks. Raises LlamaError that names what differs.
        """
        return contextlib.nullcontext() if self.is_leading else call_together(call, **arguments)

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """In this context this rank alone makes calls, from any thread; the others of its group run `follow` meanwhile.

        For the first rank of a model-parallel group. With one rank there is nothing to lead, and nothing changes.
        """
        if parallel.group().size() == 1:
            yield
            return
        if self.is_leading or not parallel.is_group_leader():
            raise LlamaError("only the first rank of a group leads, and once at a time: the others call follow()")
        with long_timeout_group() as group:
            self._channel = Channel(group)
            self.stepper.tells_cancelled = False
            try:
                yield
            finally:
                with self._turn:
                    while self._runner is not None:
                        self._turn.wait()
                    farewell = Farewell(next(self._keys), next(self._scopes))
                    self._channel.send(farewell)
                    self._channel = None
                    self._resume(farewell)

    def follow(self) -> None:
        """Carry out the steps of the rank that leads, until it leaves its context. For all ranks but the first."""
        if parallel.is_group_leader():
            raise LlamaError("the first rank of a group leads: call lead() there, and follow() on the others")
        self.stepper.tells_cancelled = False
        with long_timeout_group() as group:
            channel, error = Channel(group), None
            while isinstance(commands := channel.receive(), Commands):
                if commands.has_failed != (error is not None):
                    raise LlamaError("a step failed on one rank and not on the others") from error
                error = self._follow_step(commands)
        self._resume(commands)

    def _follow_step(self, commands: Commands) -> Exception | None:
        """Carry out a step that another rank leads; returns the error that it raised, as on that rank."""
        known: dict[int, Sequence] = {}
        for arrival in cast(abc.Sequence[Arrival], commands.arrived):
            s = arrival.make_sequence(self.tokenizer.stream_decoder(), self.maker.make_proposer, known)
            known[s.key] = s
        try:
            with self.model.kv_cache.lock:
                self._claim_slots()
                self.stepper.carry_out(replace(commands, arrived=list(known.values())))
        except Exception as e:  # a hook's, for example
            return e
        return None

    def _resume(self, farewell: Farewell) -> None:
        """All ranks make the same calls again."""
        self._keys, self._scopes = count(farewell.key), count(farewell.scope)
        self.stepper.tells_cancelled = parallel.group().size() > 1

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """In this context a thread runs the steps of all requests, whether somebody waits for them or not.

        A request that has many steps which nobody takes isn't computed further until somebody does. On several ranks
        this one leads. Afterwards requests go on while somebody waits for them, as before.
        """
        with self.lead():
            server = Server(self._turn, self._run_step, self._tidy)
            with self._turn:
                if self._server is not None:
                    raise LlamaError("the engine serves already: use the context that there is")
                self._server = server
                server.add(self.stepper.sequences.values())
            try:
                with server.run():
                    yield
            finally:
                with self._turn:
                    self._server = None
                    self._turn.notify_all()

    def notice_taken(self) -> None:
        """Somebody took steps, or cancelled a request: where the engine serves, it may go on."""
        if self._server is not None:
            with self._turn:
                self._turn.notify_all()

    # --- private ------------------------------------------------------------------------------------------------------

    def _choose_scope(self, reuse: bool) -> int | None:
        """Which requests those of a call share prefixes with; None: with none."""
        if is_dynamic(self.model):
            return None
        return SHARED if reuse else next(self._scopes)

    def _check_thread(self) -> None:
        """Raise LlamaError for a call within a step, which would wait for itself, and for a second thread on ranks."""
        if self._runner == threading.get_ident():
            raise LlamaError(
                "a hook or a logits processor made a call to the Llama whose step calls it: call the model itself "
                "there, or make the call before or after"
            )
        if parallel.group().size() == 1 or self.is_leading:
            return
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise LlamaError(
                "a second thread uses a model on several ranks, where calls of threads come in another order on each: "
                "make all calls from one thread"
            )
