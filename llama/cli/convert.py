"""`python -m llama convert`: its options, and the call."""

import argparse
from pathlib import Path

from .._util.console import say
from ..accelerate.quantization import BITS
from ..checkpoints.convert import convert
from ..checkpoints.formats import FORMATS


def add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    formats = ", ".join(f"{name}: {format.label}'s" for name, format in FORMATS.items())
    add("src", help="directory of a checkpoint, in any format that can be read")
    add("dst", help="directory to write")
    add("--to", required=True, choices=list(FORMATS), help=formats)
    add("--mp_size", metavar="N", type=int, default=1, help="shards to write in Meta's format (default: 1)")
    add("--dtype", help="bfloat16, float16 or float32 (default: that of each tensor)")
    add("--quantization", choices=sorted(BITS), help="store the layers' matrices in 4 or 8 bits (only --to hf)")
    add("--force", action="store_true", help="replace the checkpoint in dst")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    convert(options.src, options.dst, options.to, options.mp_size, options.dtype, options.force, options.quantization)
    say(f"wrote {options.dst}: {', '.join(sorted(path.name for path in Path(options.dst).iterdir()))}")
