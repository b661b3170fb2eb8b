"""A request: a prompt whose answer somebody waits for. What a caller of the engine holds.

Knows how to ask the engine for more; knows no model and no text.
"""

import weakref
from collections.abc import Iterator
from typing import Protocol

from ..errors import LlamaError
from .sequence import Sequence, Step
from .serving import MOST_BUFFERED


class Waits(Protocol):
    """The part of an engine that requests use."""

    def cancel(self, sequence: Sequence) -> None: ...
    def wait_any(self, sequences: list[Sequence]) -> None: ...
    def notice_taken(self) -> None: ...


class Request:
    """One prompt at an engine, which computes it while somebody waits for its steps.

    Iterate over it for the steps. To close it, or to let go of it, frees what it holds.
    """

    def __init__(self, engine: Waits, sequence: Sequence):
        self.sequence = sequence
        self._engine = engine
        self._finalizer = weakref.finalize(self, engine.cancel, sequence)
        self._finalizer.atexit = False

    def __iter__(self) -> Iterator[Step]:
        """The steps that nobody has taken yet, each as soon as it is there. Raises the error that it failed with."""
        while True:
            yield from self.take()
            if self.is_over:
                break
            self._engine.wait_any([self.sequence])
        if self.sequence.error is not None:
            raise self.sequence.error

    @property
    def is_over(self) -> bool:
        """Whether all steps were taken, and there are no further ones. Other threads may add some until then."""
        return self.sequence.is_over and not self.sequence.steps

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the KV cache held already."""
        return self.sequence.hit

    def take(self) -> list[Step]:
        """The steps that are there and that nobody has taken yet."""
        steps = self.sequence.steps
        taken = [steps.popleft() for _ in range(len(steps))]
        if len(taken) >= MOST_BUFFERED:
            self._engine.notice_taken()
        return taken

    def cancel(self) -> None:
        """No further steps are computed. What others wait for goes on."""
        self._finalizer()
        self._engine.notice_taken()


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
