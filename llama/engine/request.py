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
    def wait_all(self, sequences: list[Sequence]) -> None: ...
    def tidy(self) -> None: ...
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

    def take(self, most: int | None = None) -> list[Step]:
        """The steps that are there and that nobody has taken yet, `most` at most."""
        steps = self.sequence.steps
        taken = [steps.popleft() for _ in range(len(steps) if most is None else min(len(steps), most))]
        if taken and len(taken) + len(steps) >= MOST_BUFFERED:  # where it is served, it may wait for room
            self._engine.notice_taken()
        return taken

    def cancel(self) -> None:
        """No further steps are computed. What others wait for goes on."""
        self._finalizer()
        self._engine.notice_taken()


def stream_requests(engine: Waits, requests: list[Request]) -> Iterator[list[Step]]:
    """The steps of requests, in lists of those that are there at a time, in the order of their rows.

    With echo, the first list holds the prompts' own tokens. Raises LlamaError at the end for those that failed.
    """
    try:
        yield from _stream(engine, requests)
    finally:
        for request in requests:
            request.cancel()
        engine.tidy()
    raise_failures([request.sequence for request in requests])


def _stream(engine: Waits, requests: list[Request]) -> Iterator[list[Step]]:
    live = list(requests)
    echoed = not requests[0].sequence.output.echo
    while live:
        sequences = [request.sequence for request in live]
        if echoed:
            engine.wait_any(sequences)
        else:
            engine.wait_all(sequences)
            steps = [step for request in live for step in request.take(len(request.sequence.prompt))]
            echoed = True
            yield steps
        if steps := [step for request in live for step in request.take()]:
            yield steps
        live = [request for request in live if not request.is_over]


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
