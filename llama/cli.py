"""What the command-line programs share: errors in one line, the demo model as default. Knows no model."""

import contextlib
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

    Every rank raises the library's errors together (`parallel.together`), so rank 0 says it for all. The others wait
    until torchrun, seeing rank 0 gone, ends them; one that is still there has an error of its own to tell.
    """
    try:
        yield
    except LlamaError as e:
        if not is_printer():
            time.sleep(SECONDS_FOR_RANK_0)
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
        fire.Fire(main)


def checkpoint_or_demo(ckpt_dir: str | None) -> str:
    """`ckpt_dir`, or the demo model's directory where none is given."""
    if ckpt_dir is not None:
        return str(ckpt_dir)
    if not DEMO.is_dir():
        raise LlamaError(f"no --ckpt_dir was given and the demo model is not at {DEMO}: pass --ckpt_dir")
    return str(DEMO)
