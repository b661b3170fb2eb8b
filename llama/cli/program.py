"""What command-line programs share: errors in one line, flags as arguments, the demo model as default. Knows no model.

torch and fire are imported where they are used, so that `python -m llama --help` needs neither.
"""

import contextlib
import inspect
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .._util.interrupt import interrupt_in_one_line, missing_package_in_one_line
from .._util.ranks import env_rank, has_other_ranks, is_lost_rank, is_main_process
from .._util.validate import suggest
from ..checkpoints.demo import demo_checkpoint
from ..errors import LlamaError, make_printable
from .mistakes import SECONDS_FOR_RANK_0, format_error

SECONDS_TO_END = 1.0  # that a rank whose connections are closed may take to be gone


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line and exit status 1 on a LlamaError, an error of the system, or a lost rank.

    Ctrl-C ends it with status 130. Rank 0 prints an error that all ranks raise. The other ranks wait before they end,
    since torchrun kills all ranks once one has ended. A rank prints an error that it alone has.
    """
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks becomes a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with interrupt_in_one_line(), warnings_in_one_line():
            yield
        if sys.stdout is not None:  # None: a shell has closed it
            sys.stdout.flush()
    except LlamaError as e:
        if not is_main_process():
            time.sleep(SECONDS_FOR_RANK_0)
        if is_main_process() or not e.everywhere:
            print(format_error(e), file=sys.stderr, flush=True)
        if has_other_ranks():
            if sys.stdout is not None:
                sys.stdout.flush()
            os._exit(1)  # a normal exit aborts with process groups left open, and closing them may wait for other ranks
        sys.exit(1)
    except OSError as e:
        if not isinstance(e, BrokenPipeError):  # the reader of the output has ended, as in `... | head`
            print(format_error(e), file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as e:
        if not is_lost_rank(e):
            raise
        from .._util.heartbeat import name_lost_rank

        lost = name_lost_rank(SECONDS_TO_END)
        print(f"error: rank {env_rank()[0]} has lost {lost}, which has ended", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the rank that has ended


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print what a user is warned of as a line, without the place in the code. What programmers are told stays."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {make_printable(str(message))}", file=sys.stderr, flush=True)
        else:
            before(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's flags as arguments; fire reads their names and types off its signature."""
    with missing_package_in_one_line(), errors_in_one_line():
        import fire

        names = inspect.signature(main).parameters.keys() | {"help"}
        for flag in (argument.partition("=")[0] for argument in sys.argv[1:] if re.match(r"--?[a-zA-Z]", argument)):
            # fire would notice an unknown flag only after `main` has run.
            name = flag.lstrip("-").replace("-", "_")
            is_initial = len(name) == 1 and sum(known.startswith(name) for known in names - {"help"}) == 1
            if name not in names and not is_initial:
                known = f"known are --{', --'.join(sorted(names))}"
                raise LlamaError(f"unknown option {flag}; {known}{suggest(name, names, '--')}")
        fire.Fire(main)


def checkpoint_or_demo(ckpt_dir: str | None, adapter_dir: str | None = None) -> str:
    """`ckpt_dir`; or if it is None, the adapter's directory, which names its base, or the demo model's."""
    if isinstance(ckpt_dir, bool):  # what fire makes of an option without a value
        raise LlamaError("--ckpt_dir has no value: give the directory of a checkpoint")
    if isinstance(adapter_dir, bool):
        raise LlamaError("--adapter_dir has no value: give the directory of an adapter")
    if ckpt_dir is None and adapter_dir is not None:
        return str(adapter_dir)
    return demo_checkpoint() if ckpt_dir is None else str(ckpt_dir)
