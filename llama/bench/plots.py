"""A picture of benchmarks: speed against batch size, prompt length and ranks, and the limit that memory sets.

Knows the reports of this run and, as JSON, of earlier ones; knows no models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .._util.files import check_file, read_json
from .._util.packages import find_missing, missing_error
from .._util.plots import create_figure, save_figure
from ..errors import LlamaError, shorten
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
    """The speed of one subject on one kind of batch."""

    subject: str  # with the model's name and form
    ranks: int
    rows: int
    prompt: int  # tokens a row
    decode: float  # tokens a second
    prefill: float  # tokens a second
    limit: float  # of `decode`, by the bandwidth of memory
    ours: bool

    def setting(self, axis: Axis) -> tuple[tuple[Axis, int], ...]:
        """Its position on the other axes."""
        return tuple((other, getattr(self, other)) for other in AXES if other != axis)


class Chart:
    """A picture to be drawn when a run is over."""

    def __init__(self, path: str, earlier: Sequence[str]):
        """path: of the picture. earlier: files that `bench --json` printed.

        Raises LlamaError for whatever would keep the picture from being drawn later.
        """
        self.path = Path(path)
        if find_missing("matplotlib"):
            raise missing_error("--plot", "matplotlib")
        if self.path.suffix not in SUFFIXES:
            raise LlamaError(
                f"--plot is {shorten(path)}, expected the name of a file that ends in {', '.join(SUFFIXES)}"
            )
        if not self.path.parent.is_dir():
            raise LlamaError(f"--plot is {shorten(path)}, but there is no directory {self.path.parent}: make it first")
        check_file(self.path, "written")
        self.points = [point for name in earlier for point in read_points(Path(name))]

    def draw(self, report: BenchReport) -> None:
        """Write the picture, a panel for each of PANELS. A line joins runs that differ only in the panel's axis."""
        points = [*self.points, *collect_points(asdict(report))]
        figure = create_figure(12, 9)
        for axes, (axis, speed) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            draw_panel(axes, points, axis, speed)
        save_figure(figure, self.path)


def read_points(path: Path) -> list[Point]:
    report = read_json(path, "an earlier benchmark")
    try:
        return list(collect_points(report))
    except (KeyError, TypeError) as e:
        raise LlamaError(f"{path} isn't what `python -m llama bench --json` prints: {shorten(e)} in it") from e


def collect_points(report: dict[str, Any]) -> Iterator[Point]:
    """The points of a report. Batches of prompts of different lengths have none, since no axis has a place for them."""
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


def draw_panel(axes: Any, points: list[Point], axis: Axis, speed: Literal["decode", "prefill"]) -> None:
    """Draw lines against one axis, at the setting of the others at which most values were measured."""
    measured: dict[tuple[tuple[Axis, int], ...], set[int]] = {}  # values on the axis, by setting
    for point in points:
        measured.setdefault(point.setting(axis), set()).add(getattr(point, axis))
    setting = max(sorted(measured), key=lambda s: len(measured[s]), default=())
    shown = [point for point in points if point.setting(axis) == setting]
    for subject in dict.fromkeys(point.subject for point in shown):
        line = {getattr(point, axis): point for point in shown if point.subject == subject}  # the latest run
        ordered = [line[x] for x in sorted(line)]
        (drawn,) = axes.plot(sorted(line), [getattr(p, speed) for p in ordered], marker="o", label=subject)
        if speed == "decode" and ordered[0].ours:
            limits = [p.limit for p in ordered]
            axes.plot(sorted(line), limits, "_--", color=drawn.get_color(), label="the limit that memory sets")
    ticks = sorted(measured.get(setting, ()))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks], minor=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("tokens a second")
    axes.set_title(f"{speed}, {', '.join(f'{AXES[other]} {at}' for other, at in setting)}")
    if shown:
        axes.legend()
