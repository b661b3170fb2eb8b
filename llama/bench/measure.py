"""Clocks and meters: the moments of a run, their spread over repeats, how fast memory is read, how much of it is held.

Knows no model: what is timed are things that turn prompts into tokens.
"""

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..accelerate.memory_pages import in_large_pages
from ..parallel import raise_together

METER_BYTES = 1 << 28  # read at a time to measure the bandwidth: more than caches hold
METER_PASSES = 4
TURN = 8  # decoding steps
COPIES = 16  # of a pass, where it only takes a moment to be told to
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Batch:
    """Prompts of these lengths, in tokens, and how many tokens each row gets."""

    lengths: tuple[int, ...]
    gen: int

    @property
    def name(self) -> str:
        rows, longest = len(self.lengths), max(self.lengths)
        return f"{rows} x {longest}" if {*self.lengths} == {longest} else "+".join(map(str, self.lengths))

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same in every run and on every rank."""
        chance = random.Random(0)
        return [chance.choices(range(vocab_size), k=length) for length in self.lengths]


RAGGED = Batch((16, 128, 256, 512), 32)


class Subject(Protocol):
    """What is timed. `run` goes on greedily from each prompt, yielding `gen` times a token of every row.

    Whoever has what was yielded has nothing left to wait for.
    """

    @property
    def name(self) -> str: ...

    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]: ...


@dataclass(frozen=True)
class Spread:
    """A figure over repeats."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Run:
    """One repeat. moments: seconds from the start until every row had its first, second, ... token; others' turns don't
    count. bandwidth: bytes a second at which memory was read between decoding steps, the median.
    """

    moments: list[float]
    bandwidth: float

    @property
    def first(self) -> float:
        return self.moments[0]

    @property
    def step(self) -> float:
        """Seconds of a decoding step: the median one, so that a moment's interruption doesn't count."""
        return statistics.median(b - a for a, b in pairwise(self.moments))

    @property
    def total(self) -> float:
        return self.moments[-1]


class Bandwidth:
    """How fast this device's memory is read at the moment, by all ranks at once: the best of a few passes.

    On the CPU a sum, which reads each byte once; elsewhere a copy, which reads and writes it.
    """

    def __init__(self, device: torch.device):
        self._source = in_large_pages((METER_BYTES // 8,), torch.int64).fill_(1).to(device)
        self._target = None if device.type == "cpu" else torch.empty_like(self._source)

    def measure(self) -> float:
        """Bytes a second. Ranks come out of it together, so that none's clock starts while another still measures."""
        with raise_together():
            seconds = min([self._pass() for _ in range(METER_PASSES)])
            return METER_BYTES * (1 if self._target is None else 2 * COPIES) / seconds

    def _pass(self) -> float:
        synchronize(self._source)
        start = time.perf_counter()
        if self._target is None:
            self._source.sum()
        else:
            for _ in range(COPIES):
                self._target.copy_(self._source)
        synchronize(self._source)
        return time.perf_counter() - start


def synchronize(tensor: Tensor) -> None:
    """Wait until the tensor's device has done what it was told to."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()


class Timed:
    """A subject's run, a turn at a time. moments: see `Run`."""

    def __init__(self, subject: Subject, prompts: list[list[int]], gen: int):
        self.moments: list[float] = []
        self._tokens = subject.run(prompts, gen)
        self._spent = 0.0

    def go_on(self, steps: int | None = None) -> None:
        """For so many tokens of every row; None: to the end."""
        start = time.perf_counter()
        for _ in islice(self._tokens, steps):
            self.moments.append(self._spent + time.perf_counter() - start)
        self._spent = self.moments[-1]


def interleaved(
    subjects: Sequence[Subject],
    prompts: list[list[int]],
    gen: int,
    repeats: int,
    bandwidth: Bandwidth,
    turn: int = TURN,
) -> list[list[Run]]:
    """The runs of each subject, all on the same prompts. They take turns: what slows the machine slows all of them.

    turn: decoding steps that a subject makes before it's the next one's turn, so that a peer meets the same seconds.
    """
    runs: list[list[Run]] = [[] for _ in subjects]
    for _ in range(repeats):
        going = [Timed(subject, prompts, gen) for subject in subjects]
        rates: list[list[float]] = [[] for _ in subjects]
        before = bandwidth.measure()
        for steps in (1, *[turn] * -(-(gen - 1) // turn)):
            for subject, seen in zip(going, rates, strict=True):
                subject.go_on(steps)
                after = bandwidth.measure()
                seen.append((before + after) / 2)
                before = after
        for own, subject, seen in zip(runs, going, rates, strict=True):
            own.append(Run(subject.moments, statistics.median(seen[1:] or seen)))
    return runs


def status_bytes(field: str) -> int | None:
    """A size in Linux's account of this process; None on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


class Peak:
    """The most memory that this process held while in this context, in bytes; None where the system doesn't say.

    private: its own alone, looked at every other millisecond. resident: with what it has mapped from files, which the
    kernel may drop and read again; where the kernel doesn't let its own mark be reset, since the process began.
    """

    private: int | None
    resident: int | None

    def __enter__(self) -> "Peak":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        self.private, self._stop = status_bytes("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self.private is not None and not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        self.private = max(filter(None, (self.private, status_bytes("RssAnon"))), default=None)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.resident = status_bytes("VmHWM")
