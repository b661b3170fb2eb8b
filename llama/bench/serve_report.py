"""The serving benchmark's report: throughput and latencies of each subject, ratios to each peer, as text and as JSON.

Knows numbers; knows no model and no clock. The names of fields are the keys of the JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .engine_costs import ReuseFigures
from .load import ServeLoad
from .measure import Spread
from .report import ReportHead, format_number, format_report, format_spread
from .serving import Answer

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SERVE_HEADER = ["", "tokens/s", *(f"first ms {p}" for p in SHARES), *(f"between ms {p}" for p in SHARES)]
TICK = 1e-6  # seconds; shorter ones are taken for this in ratios, since tokens that come together have none between


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values are at most, between the two nearest ones where it falls between them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Percentiles:
    """Times of one repeat in seconds, or those of one subject as multiples of another's."""

    p50: float
    p95: float
    p99: float

    @staticmethod
    def over(seconds: Sequence[float]) -> "Percentiles":
        return Percentiles(*(percentile(seconds, share) for share in SHARES.values()))

    def divide(self, other: "Percentiles") -> "Percentiles":
        return Percentiles(*(getattr(self, p) / max(getattr(other, p), TICK) for p in SHARES))


@dataclass(frozen=True)
class PercentileSpreads:
    """Percentiles over the repeats."""

    p50: Spread
    p95: Spread
    p99: Spread

    @staticmethod
    def over(repeats: Sequence[Percentiles]) -> "PercentileSpreads":
        return PercentileSpreads(*(Spread.over([getattr(repeat, p) for repeat in repeats]) for p in SHARES))

    def cells(self, factor: float = 1, unit: str = "") -> list[str]:
        spreads = [getattr(self, p) for p in SHARES]
        return [format_spread(Spread(s.median * factor, s.min * factor, s.max * factor), unit) for s in spreads]


@dataclass(frozen=True)
class LoadRun:
    """One repeat of a load by one subject."""

    tokens: int  # of all answers
    seconds: float  # from the start until the last token
    first: Percentiles  # from a request's submission until its first token
    between: Percentiles  # from a token to the next one of the same answer

    @staticmethod
    def of(answers: Sequence[Answer]) -> "LoadRun":
        return LoadRun(
            tokens=sum(len(answer.token_seconds) for answer in answers),
            seconds=max(answer.token_seconds[-1] for answer in answers),
            first=Percentiles.over([answer.token_seconds[0] - answer.submitted for answer in answers]),
            between=Percentiles.over([b - a for answer in answers for a, b in pairwise(answer.token_seconds)]),
        )

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class ServeFigures:
    """One subject's, or how many times as large this package's are as a peer's, each repeat by itself."""

    subject: str  # "llama", or a peer's name
    token_rate: Spread  # tokens a second
    first_seconds: PercentileSpreads
    between_seconds: PercentileSpreads

    @staticmethod
    def of(subject: str, runs: Sequence[LoadRun]) -> "ServeFigures":
        return ServeFigures(
            subject,
            Spread.over([run.rate for run in runs]),
            PercentileSpreads.over([run.first for run in runs]),
            PercentileSpreads.over([run.between for run in runs]),
        )

    @staticmethod
    def ratios(peer: str, ours: Sequence[LoadRun], theirs: Sequence[LoadRun]) -> "ServeFigures":
        pairs = list(zip(ours, theirs, strict=True))
        return ServeFigures(
            peer,
            Spread.over([a.rate / b.rate for a, b in pairs]),
            PercentileSpreads.over([a.first.divide(b.first) for a, b in pairs]),
            PercentileSpreads.over([a.between.divide(b.between) for a, b in pairs]),
        )

    def cells(self) -> list[str]:
        """Its row of the table."""
        spreads = [*self.first_seconds.cells(1000), *self.between_seconds.cells(1000)]
        return [self.subject, format_spread(self.token_rate), *spreads]

    def ratio_cells(self) -> list[str]:
        """The row of ratios."""
        spreads = [*self.first_seconds.cells(unit="x"), *self.between_seconds.cells(unit="x")]
        return [f"vs {self.subject}", format_spread(self.token_rate, "x"), *spreads]


@dataclass(frozen=True)
class ServeReport(ReportHead):
    """The report of the serving benchmark."""

    load: ServeLoad
    slots: int  # requests that go on at a time
    prefill_chunk: int  # tokens of prompts in one forward pass of this package
    figures: list[ServeFigures]
    ratios: list[ServeFigures]  # this package's divided by each peer's
    reuse: ReuseFigures
    python_seconds: float | None  # of a step at `slots` rows, outside of the forward pass and sampling; on the CPU only

    def as_text(self) -> str:
        """Facts about model, machine and load, and a table of the figures."""
        load = self.load
        loop = f"{load.clients} clients" if load.rate is None else f"{load.rate:g} requests a second"
        facts = {
            **self.describe_head(),
            "load": f"{load.requests} requests of {load.prompt_range} tokens in and {load.gen_range} out, {loop}, "
            f"seed {load.seed}; {self.slots} slots, {self.prefill_chunk} tokens of prompts a pass",
            "figures": f"median (least-most) of {self.repeats} repeats after a warm-up",
            "reuse": describe_reuse(self.reuse),
        }
        if self.python_seconds is not None:
            milliseconds = format_number(self.python_seconds * 1000)
            facts["Python"] = f"{milliseconds} ms of a step at {self.slots} rows, outside of the passes and sampling"
        rows = [figures.cells() for figures in self.figures] + [ratio.ratio_cells() for ratio in self.ratios]
        return format_report(facts, [SERVE_HEADER, *rows], text_columns=1)


def describe_reuse(reuse: ReuseFigures) -> str:
    first, second = (format_number(seconds * 1000) for seconds in (reuse.first_seconds, reuse.second_seconds))
    ratio = format_number(reuse.second_seconds / reuse.first_seconds)
    return (
        f"a second request with {reuse.common:,} of {reuse.prompt:,} tokens in common: first token after {second} ms, "
        f"the first one's {first} ms ({ratio}x)"
    )
