"""Ctrl-C in a command-line program: one line and exit status 130, whatever the program does at that moment.

Knows signals and the exit; knows no command. Imports nothing that takes time, since it is called first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from types import FrameType
from typing import NoReturn

from .ranks import env_rank

EXIT_STATUS = 130  # what shells report of a program that Ctrl-C ended
IMPORTING = "<frozen importlib"  # how names of the import system's files begin


@contextlib.contextmanager
def interrupt_in_one_line() -> Iterator[None]:
    """End the program on Ctrl-C in this context, with a line by rank 0.

    KeyboardInterrupt is raised, so that temporary files are removed. Libraries may turn it into an error of their own;
    so any error counts that comes after the signal.
    """
    signals = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals == 1 and not is_importing(frame):
            raise KeyboardInterrupt
        end()  # an import may swallow the exception, and then go on with half a module

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # in another thread, which gets no signals
        yield
        return
    try:
        yield
    except BaseException as e:
        if signals or isinstance(e, KeyboardInterrupt):
            end()
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def hold_interrupt() -> Iterator[None]:
    """Let a Ctrl-C in this context have its effect at the context's end, and a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no signal comes here, or none that Python code could hold back
        return
    held: list[tuple[int, FrameType | None]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if len(held) == 1:
        before(*held[0])


def run_main(module: str) -> None:
    """Import a module and call its `main`. Until that does otherwise, Ctrl-C ends the program at once.

    Without a package that it needs, as in a Python that isn't the one it was installed for, it ends with one line.
    """
    before = signal.signal(signal.SIGINT, lambda *_: end())  # there is nothing to clean up yet
    try:
        with missing_package_in_one_line():
            import_module(module).main()
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def missing_package_in_one_line() -> Iterator[None]:
    """End the program with one line where a package is missing that this one needs."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        sys.exit(
            f"error: {sys.executable} has no {e.name}, which this package needs: start the Python that it was "
            "installed for, as by `source .venv/bin/activate`, or install it for this one"
        )


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where `frame` is."""
    while frame is not None and not frame.f_code.co_filename.startswith(IMPORTING):
        frame = frame.f_back
    return frame is not None


def end() -> NoReturn:
    """End this process at once: a normal exit may wait for other ranks, or abort with process groups left open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    flush_output()
    if env_rank()[0] == 0:
        with contextlib.suppress(OSError):
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")  # a note, or ^C, is before it
    os._exit(EXIT_STATUS)


def flush_output() -> None:
    """Write out what the streams still hold, before an exit that wouldn't."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
