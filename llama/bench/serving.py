"""Drives a load through this package: the engine, or closed batches. Notes when each token of an answer was there.

Knows `Llama`, `Engine` and the clock; knows no figures and no other program.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..engine.request import Request
from ..generation import Llama
from .load import Answer, Arrivals, LoadRequest, ServeLoad


class ServingSubject(Protocol):
    """Something that answers a load."""

    @property
    def name(self) -> str: ...

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        """Answer all requests, each when it comes; returns their answers in the same order."""


@dataclass(frozen=True)
class EngineServing:
    """This package: one thread submits what comes to the engine, and waits for whichever answer goes on first."""

    llama: Llama
    name: str = "llama"

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        engine, arrivals = self.llama.engine, Arrivals(load, requests)
        answers: dict[int, Answer] = {}
        live: list[tuple[Request, Answer]] = []
        start = time.perf_counter()
        while arrivals or live:
            for number, asked, submitted in arrivals.take(time.perf_counter() - start, len(live)):
                answers[number] = Answer(submitted)
                live.append((engine.submit(asked.prompt, max_gen_len=asked.gen, temperature=0), answers[number]))
            if not live:
                wait_for_next(arrivals, start)
                continue
            engine.wait_any([request.sequence for request, _ in live])
            live = note_tokens(live, time.perf_counter() - start)
        return [answers[number] for number in range(len(requests))]


@dataclass(frozen=True)
class ClosedServing:
    """This package in closed batches: those that wait, `slots` at most, are answered together.

    The next ones begin when all of a batch have ended.
    """

    llama: Llama
    slots: int
    name: str = "closed"

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        arrivals, waiting = Arrivals(load, requests), deque[tuple[LoadRequest, Answer]]()
        answers: dict[int, Answer] = {}
        start = time.perf_counter()
        while arrivals or waiting:
            for number, asked, submitted in arrivals.take(time.perf_counter() - start, len(waiting)):
                answers[number] = Answer(submitted)
                waiting.append((asked, answers[number]))
            if waiting:
                self.answer([waiting.popleft() for _ in range(min(self.slots, len(waiting)))], start)
            else:
                wait_for_next(arrivals, start)
        return [answers[number] for number in range(len(requests))]

    def answer(self, batch: Sequence[tuple[LoadRequest, Answer]], start: float) -> None:
        """Answer some requests, each with as many tokens as it wants."""
        rows = [{"max_gen_len": asked.gen} for asked, _ in batch]
        for steps in self.llama.stream([asked.prompt for asked, _ in batch], temperature=0, rows=rows):
            now = time.perf_counter() - start
            for step in steps:
                batch[step.row][1].token_seconds.append(now)


def note_tokens(live: Sequence[tuple[Request, Answer]], now: float) -> list[tuple[Request, Answer]]:
    """Note the tokens that are there now. Returns those that go on. Raises the error of one that failed."""
    going = []
    for request, answer in live:
        answer.token_seconds += [now] * len(request.take())
        if not request.is_over:
            going.append((request, answer))
        elif request.sequence.error is not None:
            raise request.sequence.error
    return going


def wait_for_next(arrivals: Arrivals, start: float) -> None:
    """Sleep until the next request comes, which is while none waits for an answer."""
    if arrivals.next_arrival is not None:
        time.sleep(max(start + arrivals.next_arrival - time.perf_counter(), 0))
