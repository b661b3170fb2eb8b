"""`python -m llama convert`: its options, and the call."""

import argparse
from pathlib import Path

from .._util.console import say
from ..accelerate.quantization import BITS
from ..adapters.opening import open_adapted
from ..checkpoints.convert import convert
from ..checkpoints.formats import FORMATS


def add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = "For example: python -m llama convert Llama-3.2-1B Llama-3.2-1B-hf --to hf"
    add = command.add_argument
    formats = ", ".join(f"{name}: {format.label}'s" for name, format in FORMATS.items())
    add("src", metavar="SRC", help="directory of a checkpoint in any format, or of an adapter with its base")
    add("dst", metavar="DST", help="directory to write")
    add("--to", required=True, choices=list(FORMATS), help=formats)
    add("--mp_size", metavar="N", type=int, default=1, help="shards to write in Meta's format (default: 1)")
    add("--dtype", help="bfloat16, float16 or float32 (default: that of each tensor)")
    add("--quantization", choices=sorted(BITS), help="store the layers' matrices in 4 or 8 bits (only --to hf)")
    add("--adapter_dir", metavar="DIR", help="directory of an adapter of peft's, which is merged into the weights")
    add("--force", action="store_true", help="replace the checkpoint in DST")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    source = open_adapted(options.src, options.adapter_dir)
    convert(source, options.dst, options.to, options.mp_size, options.dtype, options.force, options.quantization)
    say(f"wrote {options.dst}: {', '.join(sorted(path.name for path in Path(options.dst).iterdir()))}")
