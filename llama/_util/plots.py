"""Plots as files: an empty figure to draw on, and the file that it becomes. Only these functions import matplotlib.

Knows files; knows nothing of what is drawn.
"""

from functools import partial
from pathlib import Path
from typing import Any

from .files import write_whole


def create_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of this size in inches."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write the picture in the format of the file's suffix, whole or not at all."""
    write_whole(path, partial(figure.savefig, format=path.suffix.removeprefix(".")))
