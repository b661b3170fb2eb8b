"""The thread of an engine that serves: it runs steps for all requests, while their callers do something else.

Knows sequences and threads; knows no model.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from ..errors import LlamaError
from .sequence import Sequence

MOST_BUFFERED = 64  # steps that nobody has taken, after which a sequence waits


class Server:
    """Which sequences the thread computes, and the thread. All of it is used with `turn`."""

    def __init__(
        self,
        turn: threading.Condition,
        run_step: Callable[[list[int]], None],
        tidy: Callable[[], None],
        is_busy: Callable[[], bool],
    ) -> None:
        """run_step: one step for the sequences with these keys, which lets go of `turn` meanwhile.

        is_busy: whether another thread runs a step.
        """
        self._turn, self._run_step, self._tidy, self._is_busy = turn, run_step, tidy, is_busy
        self.thread: int | None = None  # its number, once it runs
        self._sequences: dict[int, Sequence] = {}  # by key: those that aren't over
        self._is_running = False

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._sequences |= {s.key: s for s in sequences}

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """In this context the thread runs."""
        self._is_running = True
        thread = threading.Thread(target=self._loop, name="llama-engine", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._turn:
                self._is_running = False
                self._turn.notify_all()
            thread.join()

    def _loop(self) -> None:
        self.thread = threading.get_ident()
        with self._turn:
            while self._is_running:
                if self._is_busy():
                    self._turn.wait()
                    continue
                ended = [key for key, s in self._sequences.items() if s.is_over]
                for key in ended:
                    del self._sequences[key]
                wanted = [s for s in self._sequences.values() if len(s.steps) < MOST_BUFFERED]
                if wanted:
                    self._step(wanted)
                    continue
                if ended:
                    self._give_back()
                self._turn.wait()

    def _give_back(self) -> None:
        """What has ended gives back its memory, on all ranks. Where one is lost, what goes on can't be finished."""
        try:
            self._tidy()
        except BaseException as e:
            sequences = list(self._sequences.values())
            self._end_all(sequences, e)
            self._tell(sequences)

    def _step(self, wanted: list[Sequence]) -> None:
        try:
            self._run_step([s.key for s in wanted])
        except BaseException as e:  # whatever a hook raises; the thread goes on with what comes later
            self._end_all(wanted, e)
        self._tell(wanted)

    def _end_all(self, sequences: list[Sequence], error: BaseException) -> None:
        for s in sequences:
            end_with(s, error)

    def _tell(self, sequences: list[Sequence]) -> None:
        for s in sequences:
            if s.notify is not None and (s.steps or s.is_over):
                try:
                    s.notify()
                except BaseException as e:  # the caller's own function, which is its own failure
                    end_with(s, e, "notify raised ")


def end_with(sequence: Sequence, error: BaseException, what: str = "") -> None:
    """End a sequence with an error."""
    sequence.error = LlamaError(f"row {sequence.index}: {what}{type(error).__name__}: {error}")
    sequence.error.__cause__ = error
    sequence.is_over = True
