"""What a talk shows: answers on standard output, and asides, which are no part of them, apart.

Knows terminals and pipes; knows no dialog and no model.
"""

import os
import sys

from .ranks import is_main_process

UNPRINTABLE = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def at_terminal() -> bool:
    """Whether a person types here and reads what is shown, rather than a file or another program."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def say(text: str, end: str = "\n") -> None:
    """Print, on the one rank that does; a terminal gets no control characters that a model may have made up."""
    if is_main_process() and sys.stdout is not None:
        print(text.translate(UNPRINTABLE) if sys.stdout.isatty() else text, end=end, flush=True)


def aside(text: str, dim: bool = True, end: str = "\n") -> None:
    """Tell, on the one rank that does, what is no answer: dim at a terminal, else on standard error."""
    stream = sys.stdout if at_terminal() else sys.stderr
    if not is_main_process() or stream is None:
        return
    text = text.translate(UNPRINTABLE)
    coloured = dim and at_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"{DIM}{text}{PLAIN}" if coloured else text, end=end, file=stream, flush=True)
