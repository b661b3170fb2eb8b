"""The load of the serving benchmark: requests of random lengths, when each of them comes, and what came of it.

The same seed gives the same lengths and moments. Knows numbers; knows no model and no clock.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Range:
    """Whole numbers, any of which is as likely."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}-{self.most}"


@dataclass(frozen=True)
class LoadRequest:
    """One request of a load."""

    prompt: list[int]  # token ids
    gen: int  # tokens that its answer gets
    arrival: float | None  # seconds after the start; None in a closed loop, where it comes once a client is free


@dataclass(frozen=True)
class ServeLoad:
    """How many requests come, when, and how long they are."""

    requests: int = 32
    clients: int = 8  # of a closed loop: each sends its next request as soon as it has got its answer
    rate: float | None = None  # requests a second of an open loop, whose arrivals are a Poisson process; None: closed
    prompt_range: Range = Range(16, 512)  # tokens of a prompt
    gen_range: Range = Range(8, 128)  # tokens of an answer
    seed: int = 1

    def make_requests(self, vocab_size: int, turn: int = 0) -> list[LoadRequest]:
        """The requests in the order in which they come.

        turn: another one has the same lengths and arrivals, and other tokens, so that no cache has seen them.
        """
        shapes, tokens = random.Random(self.seed), random.Random(f"{self.seed} {turn}")
        requests, arrival = [], 0.0
        for _ in range(self.requests):
            length = shapes.randint(self.prompt_range.least, self.prompt_range.most)
            gen = shapes.randint(self.gen_range.least, self.gen_range.most)
            arrival += 0.0 if self.rate is None else shapes.expovariate(self.rate)
            prompt = tokens.choices(range(vocab_size), k=length)
            requests.append(LoadRequest(prompt, gen, None if self.rate is None else arrival))
        return requests


@dataclass
class Answer:
    """What the client of one request saw. All times are seconds after the start of the load."""

    submitted: float  # since when it waited
    token_seconds: list[float] = field(default_factory=list)  # when it had the 1st, 2nd, ... token


class Arrivals:
    """Hands out a load's requests as they come."""

    def __init__(self, load: ServeLoad, requests: Sequence[LoadRequest]):
        self._clients = load.clients
        self._coming = deque(enumerate(requests))

    def __bool__(self) -> bool:
        """Whether some are still to come."""
        return bool(self._coming)

    @property
    def next_arrival(self) -> float | None:
        """When the next one comes, in seconds after the start; None: once a client is free."""
        return self._coming[0][1].arrival

    def take(self, now: float, unanswered: int) -> list[tuple[int, LoadRequest, float]]:
        """Those that have come until now: their numbers, and since when their clients wait.

        now: seconds after the start. unanswered: how many of those that came before still wait for their answers.
        """
        taken: list[tuple[int, LoadRequest, float]] = []
        while self._coming:
            number, request = self._coming[0]
            has_come = unanswered + len(taken) < self._clients if request.arrival is None else request.arrival <= now
            if not has_come:
                break
            self._coming.popleft()
            taken.append((number, request, now if request.arrival is None else request.arrival))
        return taken
