"""`python -m llama`: see `llama.cli.commands`."""

from .cli.commands import main

if __name__ == "__main__":
    main()
