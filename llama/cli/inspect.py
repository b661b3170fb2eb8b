"""`python -m llama inspect`: its options, and the report that it prints."""

import argparse
import sys

from .._util.console import say
from ..adapters.opening import survey_adapted
from ..checkpoints.inspect import report_on


def add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = "The exit status is 1 if something is wrong."
    add = command.add_argument
    add(
        "directory",
        metavar="DIR",
        help="directory of the checkpoint, in any format that is read, or of an adapter",
    )
    add("--adapter_dir", metavar="DIR", help="directory of an adapter of peft's, to be checked with it")
    add("--mp_size", metavar="N", type=int, default=1, help="model-parallel ranks that share it (default: 1)")
    add("--max_seq_len", metavar="N", type=int, default=512, help="most tokens of prompt and answer (default: 512)")
    add("--max_batch_size", metavar="N", type=int, default=4, help="prompts at a time (default: 4)")
    add("--dtype", help="bfloat16, float16 or float32, to run in (default: that of the files)")
    add("--json", action="store_true", help="print one JSON object, for programs")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the report. The exit status is 1 if something is wrong, for scripts."""
    report = report_on(
        survey_adapted(options.directory, options.adapter_dir, argument="DIR"),
        mp_size=options.mp_size,
        max_seq_len=options.max_seq_len,
        max_batch_size=options.max_batch_size,
        dtype=options.dtype,
    )
    say(report.as_json() if options.json else report.as_text())
    if not report.ok:
        sys.exit(1)
