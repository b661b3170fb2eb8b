"""Who runs the next step: whoever waits does, for all that somebody waits for, or the thread that serves.

Knows threads and ranks; what a step does is `Stepper`'s, what is asked for is `Engine`'s.
"""

import contextlib
import threading
from collections import Counter, abc, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch.distributed import is_initialized

from .. import parallel
from .._util.interrupt import hold_interrupt
from ..errors import LlamaError
from ..model import Transformer
from .agreement import STEP, Intention, Live, agree_on_model, check_one_thread, may_step
from .forward_pass import find_cache_dtype, read_cast
from .leading import Channel, Commands
from .sequence import Sequence
from .serving import Server
from .stepper import Stepper

NUMBERS = count(1)  # of engines: ranks make them in the same order


class StepRunner:
    """Sequences that are waited for, and the steps that are run for them."""

    def __init__(self, model: Transformer, stepper: Stepper, n_slots: int):
        self.model, self.stepper, self.n_slots = model, stepper, n_slots
        self._number = next(NUMBERS)
        self._next_key = 1  # of sequences, which all ranks make in the same order
        self._lock = threading.RLock()  # guards what follows; Ctrl-C can't come between taking it and the block
        self._turn = threading.Condition(self._lock)
        self._runner: int | None = None  # the thread that runs a step now
        self._made: WeakSet[Sequence] = WeakSet()
        self._waited: Counter[int] = Counter()  # by key: callers that wait for a step
        self._arrived: deque[Sequence] = deque()  # since the last step
        self._cancelled: deque[Sequence] = deque()  # since the last step; appended to without a lock, at any moment
        self._open_scopes: set[int] = set()  # those that get more sequences
        self._closed_scopes: list[int] = []  # since the last step
        self._thread: int | None = None  # that uses the engine, on several ranks
        self._channel: Channel | None = None  # to the ranks that follow this one
        self._has_failed = False  # whether the last step raised an error
        self._server: Server | None = None

    @property
    def is_leading(self) -> bool:
        """Whether this rank submits alone, and the others follow."""
        return self._channel is not None

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
        with self._lock:
            self._welcome(sequences)
            try:
                self._waited.update(s.key for s in sequences)
                self._turn.notify_all()  # a thread that serves may wait for room that there is by now
                while not enough(bool(s.steps) or s.is_over for s in sequences):
                    if self._runner is not None or self._server is not None:
                        self._turn.wait()
                    elif self._may_step(sequences):
                        self._run_step(list(self._waited))
            finally:
                self._waited.subtract(s.key for s in sequences)
                self._waited += Counter()  # forgets those that nobody waits for

    def _welcome(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences are waited for, some for the first time. Called with `_turn`."""
        new = [s for s in sequences if not s.has_arrived and not s.is_over]
        self._number_sequences(new)
        for s in new:
            s.has_arrived = True
        self._arrived += new
        if self._server is not None and new:
            self._server.add(new)
            self._turn.notify_all()

    def _number_sequences(self, sequences: abc.Iterable[Sequence]) -> None:
        """Give new sequences their keys, in the order in which they are made, which is the same on all ranks."""
        for s in sequences:
            if s.key:
                continue
            s.key, s.cast = self._next_key, read_cast(self.model.device.type)
            self._next_key += 1
            if any(other.cast != s.cast for other in self._made if not other.is_over):
                raise LlamaError("calls in and out of torch.autocast can't go on at the same time: end the others")
            self._made.add(s)

    def _forget_from(self, key: int) -> None:
        """The sequences from this key on are of a call that failed: their keys are given again."""
        with self._lock:
            for s in self._made:
                s.is_over |= s.key >= key
            self._next_key = key

    def _run_step(self, waited: list[int]) -> None:
        """One step, without holding back other threads that want to say something. Called with `_turn`."""
        with hold_interrupt():
            arrived, cancelled, closed = list(self._arrived), list(self._cancelled), self._closed_scopes
            self._arrived.clear()
            for _ in cancelled:
                self._cancelled.popleft()
            commands = Commands(
                waited=waited,
                arrived=arrived,
                cancelled=[s.key for s in cancelled],
                closed_scopes=closed,
                open_scopes=frozenset(self._open_scopes),
                by_hand=self.model.kv_cache.by_hand,
                has_failed=self._has_failed,
            )
            self._closed_scopes, self._has_failed = [], False
            with contextlib.ExitStack() as stack:
                try:
                    cast = self._find_cast()
                    stack.enter_context(self._busy())
                    stack.enter_context(cast)
                    commands = self._prepare(commands)
                except BaseException:  # nobody has been told of them: the next step is to do so
                    self._arrived.extendleft(reversed(arrived))
                    self._cancelled.extendleft(reversed(cancelled))
                    self._closed_scopes = [*closed, *self._closed_scopes]
                    self._has_failed = commands.has_failed
                    raise
                self._carry_out(commands)

    def _prepare(self, commands: Commands) -> Commands:
        """Look at the model, and tell the ranks that follow. Ranks that all make the same calls decide together."""
        forgets = self.stepper.notice_edits(commands.arrived)
        resets, is_fast = self._claim_slots(), self.stepper.is_fast()
        if parallel.group().size() > 1 and self._channel is None and commands.arrived:
            forgets, resets = agree_on_model(forgets, resets, is_fast)
        commands = replace(commands, resets=resets, forgets=forgets, is_fast=is_fast)
        if self._channel is not None:
            self._channel.send(commands)
        return commands

    def _carry_out(self, commands: Commands) -> None:
        try:
            self.stepper.carry_out(commands)
        except BaseException:
            self._has_failed = True
            raise

    def _find_cast(self) -> contextlib.AbstractContextManager[Any]:
        """`torch.autocast` as those who ask had it, whichever thread runs the step. Called with `_turn`."""
        casts = {s.cast for s in self._made if not s.is_over}
        device = self.model.device.type
        if not casts or casts == {read_cast(device)}:
            return contextlib.nullcontext()
        (cast,) = casts
        return torch.autocast(device, dtype=cast, enabled=cast is not None)

    def tidy(self) -> None:
        """End what was cancelled, and give back its memory, unless the next step is to do so."""
        with self._lock:
            if self._runner is not None or not is_initialized():
                return
            if parallel.group().size() > 1:
                if self.is_leading and (self._cancelled or self._closed_scopes):
                    self._run_step([])  # the others are to do the same
                return
            lock = self.model.kv_cache.lock
            if not lock.acquire(blocking=False):  # somebody else uses the model: the next step does it
                return
            try:
                if self.model.kv_cache.owner is self:
                    cancelled = [self._cancelled.popleft().key for _ in range(len(self._cancelled))]
                    self.stepper.tidy(Commands((), cancelled=cancelled, closed_scopes=self._closed_scopes))
                    self._closed_scopes = []
            finally:
                lock.release()

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

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_thread(self) -> None:
        """Raise LlamaError for a call within a step, which would wait for itself, and for a second thread on ranks."""
        if threading.get_ident() in (self._runner, self._server and self._server.thread):
            raise LlamaError(
                "a hook, a logits processor or notify made a call to the Llama whose step calls it: call the model "
                "itself there, or make the call before or after"
            )
        if parallel.group().size() > 1 and not self.is_leading:
            self._thread = self._thread or threading.get_ident()
            check_one_thread(self._thread)

    def _find_live(self) -> Live:
        return frozenset((self._number, s.key) for s in self._made if not s.is_over)

    def _may_step(self, sequences: list[Sequence]) -> bool:
        """Whether all ranks make the next step; False: the first rank has ended what is waited for."""
        if parallel.group().size() == 1 or self.is_leading:
            return True
        waited = frozenset((self._number, key) for key in self._waited)
        if may_step(Intention(STEP, waited=waited, live=self._find_live(), engine=self._number)):
            return True
        for s in sequences:
            self.cancel(s)
        return False
