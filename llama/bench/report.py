"""What the benchmark measured: figures of each batch, ratios to peers, and the report of them, as a table and as JSON.

Knows numbers; knows no model and no clock.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import make_printable
from .measure import Batch, Run, Spread

LABEL_WIDTH = 12
SPREADS = ["first token s", "prefill tok/s", "decode tok/s", "total s"]
HEAD = ["batch", "", *SPREADS, "MB/token", "GB/s", "machine GB/s", "share"]
NAMES = 2  # columns of text, which begins on the left; numbers end on the right


@dataclass(frozen=True)
class Figures:
    """One subject on one kind of batch, on rank 0. Rates are of all rows together, spreads over the repeats.

    rows, prompt, gen: of the batch; prompt: tokens, None where rows differ. first_seconds: until every row has its
    first token. prefill_rate, decode_rate: tokens a second. total_seconds: of prefill and decoding. bytes_per_token:
    weights and cached keys and values that decoding reads, divided by the rows. read_rate: bytes a second, so read.
    bandwidth: bytes a second that the machine could read just then. share: read_rate in bandwidth.
    """

    subject: str
    batch: str
    rows: int
    prompt: int | None
    gen: int
    first_seconds: Spread
    prefill_rate: Spread
    decode_rate: Spread
    total_seconds: Spread
    bytes_per_token: float
    read_rate: Spread
    bandwidth: Spread
    share: Spread

    @staticmethod
    def of(subject: str, batch: Batch, runs: Sequence[Run], bytes_per_step: float) -> "Figures":
        rows, same = len(batch.lengths), len({*batch.lengths}) == 1
        return Figures(
            subject=subject,
            batch=batch.name,
            rows=rows,
            prompt=batch.lengths[0] if same else None,
            gen=batch.gen,
            first_seconds=Spread.of([run.first for run in runs]),
            prefill_rate=Spread.of([sum(batch.lengths) / run.first for run in runs]),
            decode_rate=Spread.of([rows / run.step for run in runs]),
            total_seconds=Spread.of([run.total for run in runs]),
            bytes_per_token=bytes_per_step / rows,
            read_rate=Spread.of([bytes_per_step / run.step for run in runs]),
            bandwidth=Spread.of([run.bandwidth for run in runs]),
            share=Spread.of([bytes_per_step / run.step / run.bandwidth for run in runs]),
        )

    def cells(self) -> list[str]:
        """A row under HEAD."""
        spreads = (self.first_seconds, self.prefill_rate, self.decode_rate, self.total_seconds)
        rates = (self.bytes_per_token / 1e6, self.read_rate.median / 1e9, self.bandwidth.median / 1e9)
        return [self.batch, self.subject, *map(spread, spreads), *map(number, rates), f"{self.share.median:.0%}"]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer, repeat for repeat: to the first token, while decoding, and in all."""

    peer: str
    batch: str
    prefill: Spread
    decode: Spread
    total: Spread

    @staticmethod
    def of(peer: str, batch: Batch, ours: Sequence[Run], theirs: Sequence[Run]) -> "Ratio":
        pairs = list(zip(ours, theirs, strict=True))
        return Ratio(
            peer=peer,
            batch=batch.name,
            prefill=Spread.of([b.first / a.first for a, b in pairs]),
            decode=Spread.of([b.step / a.step for a, b in pairs]),
            total=Spread.of([b.total / a.total for a, b in pairs]),
        )

    def cells(self) -> list[str]:
        """A row under HEAD."""
        spreads = [spread(values, "x") for values in (self.prefill, self.decode, self.total)]
        return [self.batch, f"vs {self.peer}", "", *spreads, *[""] * (len(HEAD) - NAMES - len(SPREADS))]


@dataclass(frozen=True)
class BenchReport:
    """What was measured, and of what. parameters: of the whole model. ready_seconds: to load it, or to make its random
    weights. peak_*: bytes that rank 0 held, while loading and running, before there was a peer; see `measure.Peak`.
    peak_device: on a GPU. None is what the system doesn't say."""

    model: str
    random_weights: bool
    parameters: int
    dtype: str
    compile: bool
    quantization: str | None
    device: str
    processor: str
    ranks: int
    threads: int
    torch: str
    repeats: int
    ready_seconds: float
    peak_private: int | None
    peak_resident: int | None
    peak_device: int | None
    figures: list[Figures]
    ratios: list[Ratio]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """The facts, and a table."""
        weights, ready = ("random weights", "made in") if self.random_weights else ("a checkpoint", "loaded in")
        form = self.dtype + f", {self.quantization}" * bool(self.quantization) + ", compiled" * self.compile
        peaks = {"private": self.peak_private, "resident": self.peak_resident, f"on {self.device}": self.peak_device}
        facts = {
            "model": f"{self.model}, {weights}: {self.parameters / 1e6:,.0f} million parameters, {form}",
            "machine": f"{self.processor}; {self.ranks} x {self.threads} threads on {self.device}, torch {self.torch}",
            ready: f"{number(self.ready_seconds)} s",
            "peak memory": ", ".join(f"{peak / 1e9:.2f} GB {kind}" for kind, peak in peaks.items() if peak is not None),
            "figures": f"median (least-most) of {self.repeats} repeats after a warm-up"
            + ", rank 0's" * (self.ranks > 1),
        }
        lines = [f"{label:{LABEL_WIDTH}} {text or 'unknown'}" for label, text in facts.items()]
        return "\n".join(make_printable(line) for line in [*lines, "", *aligned(self._table())])

    def _table(self) -> list[list[str]]:
        rows = [HEAD]
        for batch in dict.fromkeys(figures.batch for figures in self.figures):
            rows += [figures.cells() for figures in self.figures if figures.batch == batch]
            rows += [ratio.cells() for ratio in self.ratios if ratio.batch == batch]
        return rows


def number(value: float) -> str:
    """Of three digits or more, down to thousandths."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def spread(values: Spread, unit: str = "") -> str:
    median, least, most = map(number, (values.median, values.min, values.max))
    return f"{median}{unit} ({least}-{most})"


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < NAMES else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines
