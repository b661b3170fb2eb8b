"""What the engine saves and what it costs: a prompt whose beginning is cached, and the Python of a decoding step.

Knows the engine and the clock; knows no load and no other program.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

from ..engine import stepper
from ..generation import Llama

REUSE_PROMPT, REUSE_COMMON = 1050, 1000  # tokens of two prompts, and of what both begin with
STEP_PROMPT, STEP_GEN = 16, 48  # tokens of the requests whose decoding steps are timed


@dataclass(frozen=True)
class ReuseFigures:
    """The times to the first token of two requests whose prompts begin alike, one after the other; the medians."""

    prompt: int  # tokens of each
    common: int  # tokens that both begin with
    first_seconds: float
    second_seconds: float


def measure_reuse(llama: Llama, repeats: int) -> ReuseFigures:
    """How much sooner the second of two prompts with a common beginning gets its token. Each repeat has new prompts."""
    firsts, seconds = [], []
    vocabulary = range(llama.model.params.vocab_size)
    for repeat in range(repeats):
        rng = random.Random(f"reuse {repeat}")
        first = rng.choices(vocabulary, k=REUSE_PROMPT)
        second = first[:REUSE_COMMON] + rng.choices(vocabulary, k=REUSE_PROMPT - REUSE_COMMON)
        firsts.append(time_first_token(llama, first))
        seconds.append(time_first_token(llama, second))
    return ReuseFigures(REUSE_PROMPT, REUSE_COMMON, statistics.median(firsts), statistics.median(seconds))


def time_first_token(llama: Llama, prompt: list[int]) -> float:
    """Seconds from the submission of a request until its first token, while no other runs."""
    start = time.perf_counter()
    next(iter(llama.engine.submit(prompt, max_gen_len=1, temperature=0)))
    return time.perf_counter() - start


class StageClock:
    """Adds up the seconds that calls of some functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watch(self, owner: Any, name: str) -> Iterator[None]:
        """Time the calls of a function that is an attribute, while this is entered."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        with patch.object(owner, name, timed):
            yield


def measure_python(llama: Llama, rows: int) -> float:
    """Seconds of a decoding step of so many rows outside of the forward pass and sampling, texts included; the median.

    On the CPU only: elsewhere a forward pass goes on while Python does.
    """
    clock, rng = StageClock(), random.Random("python")
    vocabulary = range(llama.model.params.vocab_size)
    live = [
        llama.engine.submit(rng.choices(vocabulary, k=STEP_PROMPT), max_gen_len=STEP_GEN, temperature=0)
        for _ in range(rows)
    ]
    outside: list[float] = []
    model = llama.model
    with clock.watch(model, "hidden_states"), clock.watch(model, "logits"), clock.watch(stepper, "choose"):
        while live:
            clock.seconds, start = 0.0, time.perf_counter()
            llama.engine.wait_any([request.sequence for request in live])
            counts = [len(request.take()) for request in live]
            seconds = time.perf_counter() - start
            if sum(counts) == rows:
                outside.append(seconds - clock.seconds)
            live = [request for request in live if not request.is_over]
    return statistics.median(outside)
