"""`python -m llama`: see `llama.cli.commands`."""

from ._util.interrupt import run_main

if __name__ == "__main__":
    run_main("llama.cli.commands")
