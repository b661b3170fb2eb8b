"""`python -m llama complete`: its options; a text is continued here, a file of prompts by `batch`."""

import argparse
import os
import sys

from .._util.console import say
from .._util.urls import is_url
from .._util.validate import check_count, check_texts
from ..engine.request_checks import check_room
from ..errors import LlamaError, make_printable
from .batch import complete_file
from .model_options import (
    INTEGER,
    add_model_options,
    build_model,
    read_settings,
    read_speculation,
    recommend_settings,
)
from .program import checkpoint_or_demo

FILE_OPTIONS = ("output", "max_batch_size", "model_parallel_size", "force")  # that only go with --input


def add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.epilog = 'For example: python -m llama complete "The sea is" --max_gen_len 40'
    add("text", metavar="TEXT", nargs="?", help="the text to continue, in quotes")
    add("--input", metavar="FILE", help='instead of a text: JSON lines of {"prompt": ...} or {"messages": [...]}')
    add("--output", metavar="FILE", help="where the answers to --input go, one line each, in the same order")
    add("--max_batch_size", **INTEGER, help="answers to --input at a time (default: 4)")
    groups = "ranks that share a model; each such group answers a part of --input (default: all ranks share one)"
    add("--model_parallel_size", **INTEGER, help=groups)
    add("--force", action="store_true", help="start over, even if --output exists or was begun")
    add_model_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if (options.text is None) == (options.input is None):
        raise LlamaError("give either a text or --input: there are " + ("both" if options.input else "neither"))
    if options.input is not None:
        return complete_lines(options)
    if misplaced := [name for name in FILE_OPTIONS if getattr(options, name)]:
        raise LlamaError(f"--{misplaced[0]} belongs to --input, and a text was given")
    complete_text(options)


def complete_text(options: argparse.Namespace) -> None:
    """Print what follows the text, piece by piece as it is generated."""
    check_texts([options.text])
    settings = {**read_settings(options, recommend_settings(options)), **read_speculation(options)}
    llama = build_model(options)
    prompt_tokens = llama.tokenizer.encode(options.text, bos=True, eos=False)
    check_room(prompt_tokens, options.max_seq_len)
    for steps in llama.stream([prompt_tokens], **settings):
        say("".join(step.text for step in steps), end="")
    say("")


def complete_lines(options: argparse.Namespace) -> None:
    """Answer every line of --input in --output, and print a summary on standard error."""
    if options.output is None:
        raise LlamaError("--input needs --output: name the file that the answers shall go to")
    max_batch_size = 4 if options.max_batch_size is None else options.max_batch_size
    check_count("max_batch_size", max_batch_size)
    settings = read_settings(options, recommend_settings(options))
    ckpt_dir, adapter_dir = checkpoint_or_demo(options.ckpt_dir, options.adapter_dir), options.adapter_dir
    # What the text of the answers depends on, beside the settings: a run goes on only with a run of the same.
    about = {name: getattr(options, name) for name in ("tokenizer_path", "max_seq_len", "dtype", "quantization")}
    about["ckpt_dir"] = ckpt_dir if is_url(ckpt_dir) else os.path.realpath(ckpt_dir)
    if adapter_dir is not None:
        about["adapter_dir"] = adapter_dir if is_url(adapter_dir) else os.path.realpath(adapter_dir)
    summary = complete_file(
        options.input,
        options.output,
        settings,
        options.seed,
        about,
        options.force,
        lambda: build_model(options, max_batch_size, options.model_parallel_size),
        read_speculation(options),
    )
    if summary is not None and sys.stderr is not None:
        print(make_printable(summary), file=sys.stderr)
