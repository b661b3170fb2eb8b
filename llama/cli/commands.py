"""`python -m llama COMMAND`: the table of commands. Each has a module of its name, with its options and what it runs.

A command's module is imported only if the command line names it, so that `--help` is quick and `chat` loads no
training. Knows no option and no model.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .._util.console import working_note
from .._util.validate import suggest
from .mistakes import Parser
from .program import errors_in_one_line

COMMANDS = {  # name, which is that of the module too: what it does
    "chat": "talk with a model",
    "complete": "continue a text, or answer a file of prompts",
    "serve": "answer clients of OpenAI's protocol over HTTP",
    "convert": "write a checkpoint in another format",
    "inspect": "show what a checkpoint holds, and what is wrong with it",
    "finetune": "train a model, or a task head on it, on your records",
    "bench": "measure how fast a model runs here, and how fast memory allows",
}


def parse() -> argparse.Namespace:
    """The options on the command line; `options.run(options)` runs the command."""
    parser = Parser(
        prog="python -m llama",
        description="Run a Llama model. Under torchrun, its ranks share the model.",
        epilog="python -m llama COMMAND --help lists the options of a command. Without --ckpt_dir, chat, complete, "
        "serve and finetune take the demo model, which comes with the package. On several GPUs, or processes: torchrun "
        "--nproc_per_node N -m llama COMMAND.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        for name, purpose in COMMANDS.items()
    }
    name, *words = sys.argv[1:] or [""]
    if name not in parsers:
        if name not in ("-h", "--help"):
            parser.error(describe_unknown(name, words))
        return parser.parse_args()
    with working_note("starting"):
        import_module(f".{name}", __package__).add_options(parsers[name])
    parsers[name].check_options(words)
    options, surplus = parser.parse_known_args()
    if surplus:
        parsers[name].refuse_words(surplus, words)
    return options


def describe_unknown(name: str, words: Sequence[str]) -> str:
    """What is wrong with a command line that begins with no command's name."""
    known = f"known are {', '.join(COMMANDS)}"
    if not name:
        return f"no command was given; {known}"
    if name.startswith("-"):
        command = next((word for word in words if word in COMMANDS), "COMMAND")
        return f"found {name} in the place of a command: write python -m llama {command} {name} ...; {known}"
    if " " in name.strip():
        return f'found a text in the place of a command: write python -m llama complete "{name}"'
    return f"unknown command {name}{suggest(name, COMMANDS) or f'; {known}'}"


def main() -> None:
    with errors_in_one_line():
        options = parse()  # imports what takes seconds
        if (level := getattr(options, "kernels", None)) is not None:
            from ..accelerate.kernels.cpu import choose_level

            choose_level(level)
        options.run(options)
