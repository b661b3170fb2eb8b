"""The engine: requests to a model come and go between two steps, and whoever waits for one runs the steps of all.

All that generates goes through `Engine.make_requests`, and all that only reads, beams too, through `Engine.read`. Knows
the model and the tokenizer; knows no file and no dialog.
"""

import contextlib
from collections import abc
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from .. import parallel
from .._util.validate import check_count
from ..errors import LlamaError, shorten
from ..model import Transformer
from ..settings import CALL_OPTIONS, settings_of_rows
from ..tokenization.protocol import AnyTokenizer
from .agreement import call_together
from .cache_book import CacheBook
from .forward_pass import is_dynamic
from .leading import Channel, Commands, Farewell, follow_steps
from .rank_groups import long_timeout_group
from .request import Request, stream_requests
from .request_checks import check_budget, check_prompts, check_speculation, check_texts_fit, check_token_ids
from .sequence import OutputOptions, Sequence, Step
from .sequence_maker import CallOptions, SequenceMaker
from .serving import Server
from .speculative import DraftProposer
from .step_runner import StepRunner
from .stepper import SHARED, Stepper

LEADING = "lead or follow"
SLOTS_PER_ROW = 4  # slots of the cache for each row of a pass, where unused ones take no memory


class Engine(StepRunner):
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
        self._arguments = model, tokenizer, seed, prefill_chunk, draft, cache_tokens
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk  # tokens of prompts in one forward pass
        self.cache_tokens = params.max_batch_size * params.max_seq_len if cache_tokens is None else cache_tokens
        n_slots = SLOTS_PER_ROW * params.max_batch_size
        if model.device.type != "cpu":  # where slots take their memory at once
            n_slots = max(min(n_slots, self.cache_tokens // params.max_seq_len), 1)
        self.last_call: list[Sequence] = []  # the sequences of the last call
        self.maker = SequenceMaker(
            params, tokenizer, seed, None if draft is None else DraftProposer(draft, prefill_chunk)
        )
        super().__init__(model, Stepper(model, CacheBook(n_slots, self.cache_tokens), prefill_chunk), n_slots)
        self._scopes = count(SHARED + 1)
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
        if name := min(CALL_OPTIONS & settings.keys(), default=None):
            raise LlamaError(f"submit has no {name}: it is for one answer; Llama.complete has it")
        if notify is not None and (self._server is None or not callable(notify)):
            raise LlamaError(f"notify is {shorten(notify)}, expected a function without arguments, within serve()")
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
        with self._lock:
            scope = self._choose_scope(options.reuse)
            sequences = self.maker.make_sequences(prompt_tokens, all_settings, scope, options)
            self._number_sequences(sequences)
            if self._server is not None:
                self._welcome(sequences)
        return [Request(self, s) for s in sequences]

    def read(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Those that are to be read and get no answer, each as soon as it was read."""
        live = list(sequences)
        check_texts_fit(sequences, self.cache_tokens)
        try:
            while live:
                self.wait_any(live)
                over = [s for s in live if s.is_over]  # looked at once: another thread's step may end more
                ended = set(over)
                live = [s for s in live if s not in ended]
                yield from over
        finally:
            for s in live:
                self.cancel(s)
            self.tidy()

    def open_scopes(self, count: int) -> list[int]:
        """For each of so many prompts, what its texts share in the KV cache until `close_scopes`: equal ones share it.

        With `dynamic` rotary scaling only texts of one prompt have the same angles.
        """
        with self._lock:
            scopes = [next(self._scopes) for _ in range(count)]
            scopes = scopes if is_dynamic(self.model) else scopes[:1] * count
            self._open_scopes.update(scopes)
        return scopes

    def close_scopes(self, scopes: list[int]) -> None:
        """What texts of these scopes have left in the KV cache goes with the next step."""
        with self._lock:
            self._open_scopes.difference_update(scopes)
            self._closed_scopes += set(scopes)
        self.tidy()

    def stream(self, requests: list[Request]) -> Iterator[list[Step]]:
        """`stream_requests` of these, which are the last call's."""
        self.last_call = [request.sequence for request in requests]
        return stream_requests(self, requests)

    def __reduce__(self) -> Any:
        """A copy is a new engine, for a copy of the model, that has answered nothing; it counts prompts as this one."""
        return Engine, self._arguments, self.maker.seeds.times_given

    def __setstate__(self, times_given: Any) -> None:
        self.maker.seeds.times_given = times_given

    # --- ranks, and a thread of its own -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, call: str, **arguments: object) -> Iterator[None]:
        """A context for the checks of a call, which fail on all ranks alike.

        call, arguments: what has to be the same on all ranks. Raises LlamaError that names what differs.
        """
        self._check_thread()
        if self.is_leading or parallel.group().size() == 1:  # other threads make calls meanwhile
            yield
            return
        first = self._next_key
        try:
            with call_together(call, self._find_live, self._number, **arguments):
                yield
        except BaseException:
            self._forget_from(first)  # some ranks may have made sequences, and others not
            raise

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """In this context this rank alone makes calls, from any thread; the others of its group run `follow` meanwhile.

        For the first rank of a model-parallel group. With one rank there is nothing to lead, and nothing changes.
        """
        if parallel.group().size() == 1:
            yield
            return
        with call_together(LEADING):
            if self.is_leading or not parallel.is_group_leader():
                raise LlamaError("only the first rank of a group leads, and once at a time: the others call follow()")
        with long_timeout_group() as group:
            self._channel = Channel(group)
            self.stepper.tells_cancelled = False
            try:
                yield
            finally:
                with self._lock:
                    while self._runner is not None:
                        self._turn.wait()
                    farewell = Farewell(self._next_key, next(self._scopes))
                    self._channel.send(farewell)
                    self._channel = None
                    self._resume(farewell)

    def follow(self) -> None:
        """Carry out the steps of the rank that leads, until it leaves its context. For all ranks but the first."""
        with call_together(LEADING):
            if parallel.is_group_leader():
                raise LlamaError("the first rank of a group leads: call lead() there, and follow() on the others")
        self.stepper.tells_cancelled = False
        with long_timeout_group() as group:
            self._resume(follow_steps(Channel(group), self.maker, self._carry_out_led))

    def _carry_out_led(self, commands: Commands) -> None:
        with self.model.kv_cache.lock:
            self.stepper.notice_edits(commands.arrived)
            self._claim_slots()
            if self.stepper.is_fast() != commands.is_fast:
                raise SystemExit("error: the model was edited or hooked on this rank otherwise than on the first one")
            self.stepper.carry_out(commands)

    def _resume(self, farewell: Farewell) -> None:
        """All ranks make the same calls again."""
        self._next_key, self._scopes = farewell.key, count(farewell.scope)
        self.stepper.tells_cancelled = parallel.group().size() > 1

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """In this context a thread runs the steps of all requests, whether somebody waits for them or not.

        A request that has many steps which nobody takes isn't computed further until somebody does. On several ranks
        this one leads. Afterwards requests go on while somebody waits for them, as before.
        """
        with self.lead():
            server = Server(self._turn, self._run_step, self.tidy, lambda: self._runner is not None)
            with self._lock:
                if self._server is not None:
                    raise LlamaError("the engine serves already: use the context that there is")
                self._server = server  # from here on nobody else begins a step
                while self._runner is not None:
                    self._turn.wait()
                server.add([*self.stepper.sequences.values(), *self._arrived])
            try:
                with server.run():
                    yield
            finally:
                with self._lock:
                    self._server = None
                    self._turn.notify_all()

    def notice_taken(self) -> None:
        """Somebody took steps, or cancelled a request: where the engine serves, it may go on."""
        if self._server is not None:
            with self._lock:
                self._turn.notify_all()

    # --- private ------------------------------------------------------------------------------------------------------

    def _choose_scope(self, reuse: bool) -> int | None:
        """Which requests those of a call share prefixes with; None: with none."""
        if is_dynamic(self.model):
            return None
        return SHARED if reuse else next(self._scopes)
