"""What a user sees: answers on standard output, notes beside them, and progress bars; all from the main process alone.

Knows terminals and pipes; knows no dialog and no model.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm as ProgressBar

from .ranks import env_rank, is_main_process

UNPRINTABLE = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
DIM, PLAIN, ERASE_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
SECONDS_BEFORE_BAR = 2  # that a step must take before its bar appears, if the step is usually short


def is_interactive() -> bool:
    """Whether standard input and output both are a terminal, so that a person types here and reads the answers."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def say(text: str, end: str = "\n") -> None:
    """Print an answer. At a terminal, control characters are replaced: a model may generate them."""
    if is_main_process() and sys.stdout is not None:
        print(text.translate(UNPRINTABLE) if sys.stdout.isatty() else text, end=end, flush=True)


def print_note(text: str, dim: bool = True, end: str = "\n") -> None:
    """Print a note that is no part of an answer: dimmed at a terminal, on standard error otherwise.

    dim: False for a note that is to be as bright as answers.
    """
    stream = sys.stdout if is_interactive() else sys.stderr
    if not is_main_process() or stream is None:
        return
    text = text.translate(UNPRINTABLE)
    dimmed = dim and is_interactive() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"{DIM}{text}{PLAIN}" if dimmed else text, end=end, file=stream, flush=True)


@contextlib.contextmanager
def working_note(text: str) -> Iterator[None]:
    """A context for a step of some seconds: `text` stands on standard error until it ends, if that is a terminal."""
    stream = sys.stderr
    if env_rank()[0] != 0 or stream is None or not stream.isatty():
        yield
        return
    can_erase = os.environ.get("TERM") != "dumb"
    print(f"({text} ...)", end="" if can_erase else "\n", file=stream, flush=True)
    try:
        yield
    finally:
        if can_erase:
            print(ERASE_LINE, end="", file=stream, flush=True)


def progress_bar(label: str, total: int, unit: str, done: int = 0, delayed: bool = False) -> ProgressBar:
    """A bar on standard error, shown only by the main process and only at a terminal; advance it with `update`.

    total: the amount of work, in units. unit: such as " tokens"; "B" for bytes, which are shown as kB, MB, GB.
    done: the part of `total` that earlier runs did. delayed: show the bar only after SECONDS_BEFORE_BAR.
    """
    return ProgressBar(
        desc=label,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        delay=SECONDS_BEFORE_BAR if delayed else 0,
        disable=None if is_main_process() else True,  # None: tqdm disables it where standard error is no terminal
    )
