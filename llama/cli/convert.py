"""`python -m llama convert`: its options, and the call."""

import argparse
from pathlib import Path

from .._util.console import say
from .._util.device import parse_dtype
from ..accelerate.quantization import BITS
from ..checkpoints.convert import convert


def add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("src", help="directory of a checkpoint, in any format that can be read")
    add("dst", help="directory to write")
    add("--to", required=True, choices=["meta", "hf"], help="Meta's format, or Hugging Face's")
    add("--mp_size", metavar="N", type=int, default=1, help="shards to write in Meta's format (default: 1)")
    add("--dtype", help="bfloat16, float16 or float32 (default: that of each tensor)")
    add("--quantization", choices=sorted(BITS), help="store the layers' matrices in 4 or 8 bits (only --to hf)")
    add("--force", action="store_true", help="replace the checkpoint in dst")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    convert(options.src, options.dst, options.to, options.mp_size, dtype, options.force, options.quantization)
    say(f"wrote {options.dst}: {', '.join(sorted(path.name for path in Path(options.dst).iterdir()))}")
