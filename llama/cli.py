"""What the command-line programs share: errors in one line, the demo model as default. Knows no model."""

import contextlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fire
import torch.distributed as dist

from .errors import LlamaError
from .parallel import is_printer

SECONDS_FOR_RANK_0 = 3
DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program on a LlamaError with one line and exit status 1, and leave the process groups.

    Rank 0 says what all ranks raise. The others let it, since torchrun ends all as soon as one has gone; one that is
    still there afterwards may have an error of its own to tell.
    """
    try:
        yield
    except LlamaError as e:
        if not is_printer():
            time.sleep(SECONDS_FOR_RANK_0)
        if is_printer() or not e.everywhere:
            print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells count an end by Ctrl-C
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's flags as arguments, which fire reads off its signature."""
    with errors_in_one_line():
        known = inspect.signature(main).parameters.keys() | {"help"}
        for flag in (argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("--")):
            # fire would notice only after the model has run.
            if flag != "--" and flag.lstrip("-").replace("-", "_") not in known:
                raise LlamaError(f"unknown option {flag}; known are --{', --'.join(sorted(known))}")
        fire.Fire(main)
        sys.stdout.flush()


def checkpoint_or_demo(ckpt_dir: str | None) -> str:
    """`ckpt_dir`, or the demo model's directory where none is given."""
    if ckpt_dir is not None:
        return str(ckpt_dir)
    if not DEMO.is_dir():
        raise LlamaError(f"no --ckpt_dir was given and the demo model is not at {DEMO}: pass --ckpt_dir")
    return str(DEMO)
