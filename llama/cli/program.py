"""What the command-line programs share: errors in one line, the demo model as default. Knows no model."""

import contextlib
import inspect
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fire
import torch.distributed as dist

from .._util.ranks import is_main_process
from ..errors import LlamaError, make_printable

SECONDS_FOR_RANK_0 = 3
DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program on a LlamaError with one line and exit status 1.

    Rank 0 says what all ranks raise. The others let it, since torchrun ends all as soon as one has gone; one that is
    still there afterwards may have an error of its own to tell.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal of few characters gets question marks for the others
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
        if sys.stdout is not None:  # as it is where a shell has closed it
            sys.stdout.flush()
    except LlamaError as e:
        if not is_main_process():
            time.sleep(SECONDS_FOR_RANK_0)
        if is_main_process() or not e.everywhere:
            print(f"error: {make_printable(str(e))}", file=sys.stderr, flush=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if sys.stdout is not None:
                sys.stdout.flush()
            os._exit(1)  # leaving the process groups may wait for other ranks, and not leaving them abort
        sys.exit(1)
    except OSError as e:
        if not isinstance(e, BrokenPipeError):  # the reader of our output has gone, as in `... | head`
            print(f"error: {make_printable(str(e))}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as e:
        if not lost_a_rank(e):
            raise
        print(f"error: rank {dist.get_rank()} has lost another rank, which has ended", file=sys.stderr, flush=True)
        os._exit(1)  # leaving the process groups would wait for it
    except KeyboardInterrupt:
        sys.exit(130)  # as shells count an end by Ctrl-C


def lost_a_rank(e: RuntimeError) -> bool:
    """Whether a collective failed since its peer has gone."""
    return dist.is_initialized() and dist.get_world_size() > 1 and ("gloo" in str(e) or isinstance(e, dist.DistError))


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's flags as arguments, which fire reads off its signature."""
    with errors_in_one_line():
        known = inspect.signature(main).parameters.keys() | {"help"}
        for flag in (argument.partition("=")[0] for argument in sys.argv[1:] if re.match(r"--?[a-zA-Z]", argument)):
            # fire would notice only after the model has run.
            if flag.lstrip("-").replace("-", "_") not in known:
                raise LlamaError(f"unknown option {flag}; known are --{', --'.join(sorted(known))}")
        fire.Fire(main)


def checkpoint_or_demo(ckpt_dir: str | None) -> str:
    """`ckpt_dir`, or the demo model's directory where none is given."""
    if isinstance(ckpt_dir, bool):  # what fire makes of an option without a value
        raise LlamaError("--ckpt_dir has no value: give the directory of a checkpoint")
    if ckpt_dir is not None:
        return str(ckpt_dir)
    if not DEMO.is_dir():
        raise LlamaError(f"no --ckpt_dir was given and the demo model is not at {DEMO}: pass --ckpt_dir")
    return str(DEMO)
