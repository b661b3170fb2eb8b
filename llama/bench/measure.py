"""Measures time and memory: when each token of a run came, memory bandwidth meanwhile, the most memory held.

Knows no model: what it times is anything that turns prompts into tokens.
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

METER_BYTES = 1 << 28  # read to measure the bandwidth: more than the processor's caches hold
METER_PASSES = 4
METER_COPIES = 16  # a pass on a GPU, where one copy would take little longer than its launch
STEPS_PER_TURN = 8  # decoding steps of a subject until it is the next one's turn
SECONDS_BETWEEN_SAMPLES = 0.002


@dataclass(frozen=True)
class Batch:
    """A batch to run: how long its prompts are, and how many tokens are generated for each."""

    lengths: tuple[int, ...]  # tokens of each prompt
    gen: int  # tokens to generate for each prompt

    @property
    def name(self) -> str:
        """Such as "8 x 512", or "16+128" for prompts of different lengths."""
        bsz, longest = len(self.lengths), max(self.lengths)
        return f"{bsz} x {longest}" if {*self.lengths} == {longest} else "+".join(map(str, self.lengths))

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same in every run and on every rank."""
        rng = random.Random(0)
        return [rng.choices(range(vocab_size), k=length) for length in self.lengths]


RAGGED = Batch((16, 128, 256, 512), 32)


class Subject(Protocol):
    """Something to time: this package, or a peer that it is compared with."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        """Generate greedily from token ids: yields `gen` times the next token of every prompt, (B).

        When tokens are yielded, their computation has ended on the device too.
        """


@dataclass(frozen=True)
class Spread:
    """A figure over the repeats of a run."""

    median: float
    min: float
    max: float

    @staticmethod
    def over(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Run:
    """One repeat of a batch by one subject."""

    token_seconds: list[float]  # from the start until every row had its 1st, 2nd, ... token, without others' turns
    bandwidth: float  # bytes a second at which memory could be read between decoding steps, the median

    @property
    def first(self) -> float:
        """Seconds until every row had its first token."""
        return self.token_seconds[0]

    @property
    def step(self) -> float:
        """Seconds of the median decoding step, so that a short interruption doesn't count."""
        return statistics.median(b - a for a, b in pairwise(self.token_seconds))

    @property
    def total(self) -> float:
        """Seconds until every row had its last token."""
        return self.token_seconds[-1]


class BandwidthMeter:
    """Measures how fast all ranks together read their device's memory.

    On the CPU a pass is a sum, which reads every byte once; elsewhere copies, which read and write it.
    """

    def __init__(self, device: torch.device):
        self._source = in_large_pages((METER_BYTES // 8,), torch.int64).fill_(1).to(device)
        self._target = None if device.type == "cpu" else torch.empty_like(self._source)

    def measure(self) -> float:
        """Bytes a second, in the best of a few passes. No rank returns while another still measures."""
        with raise_together():
            seconds = min([self._pass() for _ in range(METER_PASSES)])
            return METER_BYTES * (1 if self._target is None else 2 * METER_COPIES) / seconds

    def _pass(self) -> float:
        synchronize(self._source)
        start = time.perf_counter()
        if self._target is None:
            self._source.sum()
        else:
            for _ in range(METER_COPIES):
                self._target.copy_(self._source)
        synchronize(self._source)
        return time.perf_counter() - start


def synchronize(tensor: Tensor) -> None:
    """Wait until the tensor's device has finished all work that was submitted."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()


class TimedRun:
    """A subject's run that is timed and can be interrupted, so that other subjects run in between."""

    token_seconds: list[float]  # as of `Run`

    def __init__(self, subject: Subject, prompts: list[list[int]], gen: int):
        self.token_seconds = []
        self._tokens = subject.run(prompts, gen)
        self._seconds = 0.0  # of all turns so far

    def advance(self, steps: int | None = None) -> None:
        """Generate so many tokens of every row; None: all that remain."""
        start = time.perf_counter()
        for _ in islice(self._tokens, steps):
            self.token_seconds.append(self._seconds + time.perf_counter() - start)
        self._seconds = self.token_seconds[-1]


def time_interleaved(
    subjects: Sequence[Subject],
    prompts: list[list[int]],
    gen: int,
    repeats: int,
    meter: BandwidthMeter,
    steps_per_turn: int = STEPS_PER_TURN,
) -> list[list[Run]]:
    """Run all subjects on the same prompts; returns, for each subject, a Run for each repeat.

    Subjects take turns of a few decoding steps. Whatever slows the machine for a while then slows all of them.
    """
    runs: list[list[Run]] = [[] for _ in subjects]
    for _ in range(repeats):
        timed_runs = [TimedRun(subject, prompts, gen) for subject in subjects]
        bandwidths: list[list[float]] = [[] for _ in subjects]  # of each subject's turns
        before = meter.measure()
        for steps in (1, *[steps_per_turn] * -(-(gen - 1) // steps_per_turn)):
            for timed_run, measured in zip(timed_runs, bandwidths, strict=True):
                timed_run.advance(steps)
                after = meter.measure()
                measured.append((before + after) / 2)
                before = after
        for repeat_runs, timed_run, measured in zip(runs, timed_runs, bandwidths, strict=True):
            decoding = measured[1:] or measured  # the first turn is the prefill
            repeat_runs.append(Run(timed_run.token_seconds, statistics.median(decoding)))
    return runs


def status_bytes(field: str) -> int | None:
    """A size in bytes from Linux's /proc/self/status, such as "VmHWM"; None on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


class PeakMemory:
    """A context that measures the most memory its process held in it: bytes, or None if the system doesn't say."""

    private: int | None  # the process's own memory, sampled every 2 milliseconds
    resident: int | None  # with pages mapped from files; since the process began if the kernel's mark can't be reset

    def __enter__(self) -> "PeakMemory":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        self.private, self._stop = status_bytes("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped)
        self._thread.start()
        return self

    def _sample_until_stopped(self) -> None:
        while self.private is not None and not self._stop.wait(SECONDS_BETWEEN_SAMPLES):
            self._sample()

    def _sample(self) -> None:
        self.private = max(filter(None, (self.private, status_bytes("RssAnon"))), default=None)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.resident = status_bytes("VmHWM")
