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
        self, turn: threading.Condition, run_step: Callable[[list[int]], None], tidy: Callable[[], None]
    ) -> None:
        """run_step: one step for the sequences with these keys, which lets go of `turn` meanwhile."""
        self._turn, self._run_step, self._tidy = turn, run_step, tidy
        self._sequences: list[Sequence] = []  # that aren't over
        self._is_running = False

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._sequences += sequences

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
        with self._turn:
            while self._is_running:
                ended = [s for s in self._sequences if s.is_over]
                self._sequences = [s for s in self._sequences if not s.is_over]
                wanted = [s for s in self._sequences if len(s.steps) < MOST_BUFFERED]
                if wanted:
                    self._step(wanted)
                    continue
                if ended:
                    self._tidy()
                self._turn.wait()

    def _step(self, wanted: list[Sequence]) -> None:
        try:
            self._run_step([s.key for s in wanted])
        except Exception as e:  # whatever a hook raises; the thread goes on with what comes later
            for s in wanted:
                s.error, s.is_over = LlamaError(f"row {s.index}: {type(e).__name__}: {e}"), True
                s.error.__cause__ = e
        for s in wanted:
            if s.notify is not None and (s.steps or s.is_over):
                s.notify()
