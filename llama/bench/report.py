"""The benchmark's report: figures of each subject, ratios to each peer, as a table and as JSON.

Knows numbers; knows no model and no clock. The names of fields are the keys of the JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import make_printable
from .measure import Batch, Run, Spread

LABEL_WIDTH = 12
SPREAD_COLUMNS = ["first token s", "prefill tok/s", "decode tok/s", "total s"]
TABLE_HEADER = ["batch", "", *SPREAD_COLUMNS, "MB/token", "GB/s", "machine GB/s", "share"]
TEXT_COLUMNS = 2  # aligned on the left; columns of numbers are aligned on the right


@dataclass(frozen=True)
class SubjectFigures:
    """One subject on one batch, on rank 0. Rates are of all rows together, spreads over the repeats."""

    subject: str  # "llama", or a peer's name
    batch: str  # `Batch.name`
    rows: int  # prompts of the batch
    prompt: int | None  # tokens of each prompt; None if their lengths differ
    gen: int  # tokens generated for each prompt
    first_seconds: Spread  # until every row had its first token
    prefill_rate: Spread  # tokens a second
    decode_rate: Spread  # tokens a second
    total_seconds: Spread  # of prefill and decoding
    bytes_per_token: float  # weights and cached keys and values that a decoding step reads, divided by `rows`
    read_rate: Spread  # bytes a second that decoding read
    bandwidth: Spread  # bytes a second that the machine could read meanwhile
    share: Spread  # read_rate / bandwidth

    @staticmethod
    def from_runs(subject: str, batch: Batch, runs: Sequence[Run], bytes_per_step: float) -> "SubjectFigures":
        rows, same = len(batch.lengths), len({*batch.lengths}) == 1
        return SubjectFigures(
            subject=subject,
            batch=batch.name,
            rows=rows,
            prompt=batch.lengths[0] if same else None,
            gen=batch.gen,
            first_seconds=Spread.over([run.first for run in runs]),
            prefill_rate=Spread.over([sum(batch.lengths) / run.first for run in runs]),
            decode_rate=Spread.over([rows / run.step for run in runs]),
            total_seconds=Spread.over([run.total for run in runs]),
            bytes_per_token=bytes_per_step / rows,
            read_rate=Spread.over([bytes_per_step / run.step for run in runs]),
            bandwidth=Spread.over([run.bandwidth for run in runs]),
            share=Spread.over([bytes_per_step / run.step / run.bandwidth for run in runs]),
        )

    def cells(self) -> list[str]:
        """Its row of the table, one text for each column of TABLE_HEADER."""
        spreads = (self.first_seconds, self.prefill_rate, self.decode_rate, self.total_seconds)
        rates = (self.bytes_per_token / 1e6, self.read_rate.median / 1e9, self.bandwidth.median / 1e9)
        return [
            self.batch,
            self.subject,
            *map(format_spread, spreads),
            *map(format_number, rates),
            f"{self.share.median:.0%}",
        ]


@dataclass(frozen=True)
class PeerRatio:
    """How many times as fast as a peer this package is; the repeats of both are compared one by one."""

    peer: str
    batch: str  # `Batch.name`
    prefill: Spread  # up to the first token
    decode: Spread  # a decoding step
    total: Spread

    @staticmethod
    def from_runs(peer: str, batch: Batch, ours: Sequence[Run], theirs: Sequence[Run]) -> "PeerRatio":
        pairs = list(zip(ours, theirs, strict=True))
        return PeerRatio(
            peer=peer,
            batch=batch.name,
            prefill=Spread.over([b.first / a.first for a, b in pairs]),
            decode=Spread.over([b.step / a.step for a, b in pairs]),
            total=Spread.over([b.total / a.total for a, b in pairs]),
        )

    def cells(self) -> list[str]:
        """Its row of the table, one text for each column of TABLE_HEADER."""
        spreads = [format_spread(values, "x") for values in (self.prefill, self.decode, self.total)]
        return [
            self.batch,
            f"vs {self.peer}",
            "",
            *spreads,
            *[""] * (len(TABLE_HEADER) - TEXT_COLUMNS - len(SPREAD_COLUMNS)),
        ]


@dataclass(frozen=True)
class ReportHead:
    """What was measured, on which model and which machine."""

    model: str  # the checkpoint's name, or that of the shape
    random_weights: bool
    parameters: int  # of the whole model, on all ranks
    dtype: str
    compile: bool
    quantization: str | None
    device: str  # "cpu", "cuda" or "mps"
    processor: str  # its name, of the GPU if there is one
    ranks: int
    threads: int  # of each rank
    torch: str  # its version
    repeats: int

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def describe_head(self) -> dict[str, str]:
        """Facts about model and machine, by their labels."""
        weights = "random weights" if self.random_weights else "a checkpoint"
        form = self.dtype + f", {self.quantization}" * bool(self.quantization) + ", compiled" * self.compile
        return {
            "model": f"{self.model}, {weights}: {self.parameters / 1e6:,.0f} million parameters, {form}",
            "machine": f"{self.processor}; {self.ranks} x {self.threads} threads on {self.device}, torch {self.torch}",
        }


@dataclass(frozen=True)
class BenchReport(ReportHead):
    """The report of the plain benchmark."""

    ready_seconds: float  # to load the model, or to make its random weights
    # Bytes that rank 0 held at most while it loaded and ran, before any peer was built; None if the system doesn't say.
    peak_private: int | None  # see `PeakMemory`
    peak_resident: int | None
    peak_device: int | None  # the GPU's memory
    figures: list[SubjectFigures]
    ratios: list[PeerRatio]

    def as_text(self) -> str:
        """Facts about model and machine, and a table of the figures."""
        peaks = {"private": self.peak_private, "resident": self.peak_resident, f"on {self.device}": self.peak_device}
        facts = {
            **self.describe_head(),
            "made in" if self.random_weights else "loaded in": f"{format_number(self.ready_seconds)} s",
            "peak memory": ", ".join(f"{peak / 1e9:.2f} GB {kind}" for kind, peak in peaks.items() if peak is not None),
            "figures": f"median (least-most) of {self.repeats} repeats after a warm-up"
            + ", rank 0's" * (self.ranks > 1),
        }
        return format_report(facts, self._table())

    def _table(self) -> list[list[str]]:
        rows = [TABLE_HEADER]
        for batch in dict.fromkeys(figures.batch for figures in self.figures):
            rows += [figures.cells() for figures in self.figures if figures.batch == batch]
            rows += [ratio.cells() for ratio in self.ratios if ratio.batch == batch]
        return rows


def format_report(facts: Mapping[str, str], table: Sequence[Sequence[str]], text_columns: int = TEXT_COLUMNS) -> str:
    """Facts by their labels, and a table."""
    lines = [f"{label:{LABEL_WIDTH}} {text or 'unknown'}" for label, text in facts.items()]
    return "\n".join(make_printable(line) for line in [*lines, "", *align_columns(table, text_columns)])


def format_number(value: float) -> str:
    """With at least three significant digits, but no more than three decimals."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def format_spread(values: Spread, unit: str = "") -> str:
    """Median, least and most, such as "1.50x (1.20-1.70)"."""
    median, least, most = map(format_number, (values.median, values.min, values.max))
    return f"{median}{unit} ({least}-{most})"


def align_columns(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append(
            "  ".join(c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()
        )
    return lines
