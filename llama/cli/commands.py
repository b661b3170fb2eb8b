"""`python -m llama COMMAND`: the table of commands. Each has a module of its name, with its options and what it runs.

A command's module is imported only if the command line names it, so that `--help` is quick and `chat` loads no
training. Knows no option and no model.
"""

import argparse
import sys
from importlib import import_module

from .program import errors_in_one_line

COMMANDS = {  # name, which is that of the module too: what it does
    "chat": "talk with a model",
    "complete": "continue a text, or answer a file of prompts",
    "convert": "write a checkpoint in another format",
    "inspect": "show what a checkpoint holds, and what is wrong with it",
    "finetune": "train a model, or a task head on it, on your records",
    "bench": "measure how fast a model runs here, and how fast memory allows",
}


def parse() -> argparse.Namespace:
    """The options on the command line; `options.run(options)` runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m llama",
        description="Run a Llama model. Under torchrun, its ranks share the model.",
        epilog="python -m llama COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name in sys.argv[1:]:
            import_module(f".{name}", __package__).add_options(command)
    return parser.parse_args()


def main() -> None:
    options = parse()
    with errors_in_one_line():
        options.run(options)
