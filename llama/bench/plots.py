"""What runs of the benchmark measured, as a picture: speed against batch size, length and ranks, and its limit.

Knows reports as JSON, this run's and those of earlier ones. matplotlib is imported only here.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .._util.files import read_json
from ..errors import LlamaError
from .report import BenchReport

SUFFIXES = (".png", ".svg", ".pdf")
Axis = Literal["ranks", "rows", "prompt"]
AXES: dict[Axis, str] = {"rows": "batch size", "prompt": "prompt length", "ranks": "ranks"}
PANELS: tuple[tuple[Axis, Literal["decode", "prefill"]], ...] = (
    ("rows", "decode"),
    ("prompt", "decode"),
    ("ranks", "decode"),
    ("prompt", "prefill"),
)


@dataclass(frozen=True)
class Point:
    """One subject on one kind of batch. decode, prefill: tokens a second; limit: of decoding, by the bandwidth."""

    subject: str
    ranks: int
    rows: int
    prompt: int
    decode: float
    prefill: float
    limit: float
    ours: bool

    def setting(self, axis: Axis) -> tuple[tuple[Axis, int], ...]:
        """Where it stands on the other axes."""
        return tuple((other, getattr(self, other)) for other in AXES if other != axis)


class Chart:
    """A picture to be drawn when a run is over. What would keep it from being drawn is told when it is made."""

    def __init__(self, path: str, earlier: Sequence[str]):
        """path: of the picture. earlier: files of what `bench --json` printed. Raises LlamaError."""
        self.path = Path(path)
        if importlib.util.find_spec("matplotlib") is None:
            raise LlamaError("--plot needs a package that isn't here: pip install matplotlib")
        if self.path.suffix not in SUFFIXES:
            raise LlamaError(f"--plot is {path!r}, expected the name of a file that ends in {', '.join(SUFFIXES)}")
        if not self.path.parent.is_dir():
            raise LlamaError(f"--plot is {path!r}, but there is no directory {self.path.parent}: make it first")
        self.points = [point for name in earlier for point in read_points(Path(name))]

    def draw(self, report: BenchReport) -> None:
        """Write the picture: one panel for each of PANELS. A line goes through all runs that differ in one thing."""
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen

        points = [*self.points, *points_of(asdict(report))]
        figure = Figure(figsize=(12, 9), layout="constrained")
        for axes, (axis, figure_of) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            draw_panel(axes, points, axis, figure_of)
        figure.savefig(self.path)


def read_points(path: Path) -> list[Point]:
    report = read_json(path, "an earlier benchmark")
    try:
        return list(points_of(report))
    except (KeyError, TypeError) as e:
        raise LlamaError(f"{path} isn't what `python -m llama bench --json` prints: {e!r} in it") from e


def points_of(report: dict[str, Any]) -> Iterator[Point]:
    """What of a report has a place on the axes: all but batches of different lengths."""
    model = f"{Path(report['model']).name} {report['dtype']}"
    form = f" {report['quantization']}" * bool(report["quantization"]) + " compiled" * report["compile"]
    for figures in report["figures"]:
        ours = figures["subject"] == report["figures"][0]["subject"]
        if figures["prompt"] is not None:
            yield Point(
                subject=f"{figures['subject']}, {model}{form * ours}",
                ranks=report["ranks"],
                rows=figures["rows"],
                prompt=figures["prompt"],
                decode=figures["decode_rate"]["median"],
                prefill=figures["prefill_rate"]["median"],
                limit=figures["bandwidth"]["median"] / figures["bytes_per_token"],
                ours=ours,
            )


def draw_panel(axes: Any, points: list[Point], axis: Axis, figure_of: Literal["decode", "prefill"]) -> None:
    """Lines against one axis, at the place on the others where most was measured."""
    reached: dict[tuple[tuple[Axis, int], ...], set[int]] = {}
    for point in points:
        reached.setdefault(point.setting(axis), set()).add(getattr(point, axis))
    setting = max(sorted(reached), key=lambda s: len(reached[s]), default=())
    shown = [point for point in points if point.setting(axis) == setting]
    for subject in dict.fromkeys(point.subject for point in shown):
        line = {getattr(point, axis): point for point in shown if point.subject == subject}  # the last of equals
        own = [line[x] for x in sorted(line)]
        (drawn,) = axes.plot(sorted(line), [getattr(p, figure_of) for p in own], marker="o", label=subject)
        if figure_of == "decode" and own[0].ours:
            limits = [p.limit for p in own]
            axes.plot(sorted(line), limits, "_--", color=drawn.get_color(), label="the limit that memory sets")
    ticks = sorted(reached.get(setting, ()))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks], minor=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("tokens a second")
    axes.set_title(f"{figure_of}, {', '.join(f'{AXES[other]} {at}' for other, at in setting)}")
    if shown:
        axes.legend()
