"""Mistakes on a command line, said in one line with what was probably meant.

Knows argparse and words; knows no command and no option.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from .._util.ranks import env_rank
from .._util.validate import suggest
from ..errors import make_printable

SECONDS_FOR_RANK_0 = 3  # to print the error that all ranks have, before another rank ends and torchrun kills all
LONG_DASH = re.compile("^[\u2010-\u2015\u2212]+-?")  # what text processors make of --
SCREENFUL = 1500  # characters of a message at most


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are short, and named after what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """End the program. Of several ranks the first prints the message."""
        if env_rank()[0] != 0:
            time.sleep(SECONDS_FOR_RANK_0)
            sys.exit(2)
        self.exit(2, f"usage: {self.prog} [options]; --help lists them\n{format_error(message)}\n")

    def check_options(self, words: Sequence[str]) -> None:
        """End the program if one of the words is an option that isn't known, before argparse misses another."""
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if (plain := LONG_DASH.sub("--", name)) != name and plain in known:
                self.error(f"{name} begins with another character than -: write {plain}")
            is_option = re.match("--?[A-Za-z]", name) and " " not in name
            if is_option and not any(option.startswith(name) for option in known):
                options = [option.removeprefix("--") for option in known if option.startswith("--")]
                close = suggest(name.lstrip("-").replace("-", "_"), options, "--")
                self.error(f"unknown option {name}{close or f'; {self.prog} --help lists all'}")

    def refuse_words(self, surplus: Sequence[str], words: Sequence[str]) -> NoReturn:
        """End the program because of words that nothing takes. words: all that follow the command's name."""
        places: list[int] = []
        end = len(words)
        for word in reversed(surplus):
            end = max(i for i in range(end) if words[i] == word)
            places.insert(0, end)
        first, last = places[0], places[0]
        while last + 1 in places:
            last += 1
        if first == 0 or words[first - 1].startswith("-"):
            self.error(f"{self.prog} takes no {surplus[0]!r}: expected options alone")
        text = " ".join(words[first - 1 : last + 1])
        self.error(f'{self.prog} has no place for {surplus[0]!r}: put a text of several words in quotes: "{text}"')


def format_error(error: object) -> str:
    """The line that is printed for an error: of a long message the middle is left out."""
    text = make_printable(str(error))
    if len(text) > SCREENFUL:
        text = f"{text[: SCREENFUL * 2 // 3]} [...] {text[-SCREENFUL // 3 :]}"
    return f"error: {text}"
