"""Names of control tokens in a text: which of them become tokens, and which may not stand there.

Knows strings only.
"""

import re
from collections.abc import Collection, Iterator, Set
from typing import Literal

from ..errors import LlamaError, describe


def check_special(
    s: str,
    known: Set[str],
    allowed_special: Literal["all"] | Collection[str],
    disallowed_special: Literal["all"] | Collection[str],
) -> Set[str]:
    """The names among `known` that become control tokens in `s`. Arguments and errors as `Tokenizer.encode`."""
    if not isinstance(s, str):
        raise LlamaError(f"text to encode is {describe(s)}; expected str")
    allowed, disallowed = (
        _set_of_names(names, known, argument)
        for names, argument in ((allowed_special, "allowed_special"), (disallowed_special, "disallowed_special"))
    )
    allowed &= known
    if disallowed_special == "all":
        disallowed -= allowed
    if match := next(find_names(disallowed, s), None):
        raise LlamaError(
            f"text contains the control token {match[0]!r} at character {match.start()}, which "
            "disallowed_special forbids; remove it from the text, or put it in allowed_special"
        )
    return allowed


def _set_of_names(names: Literal["all"] | Collection[str], known: Set[str], argument: str) -> Set[str]:
    if isinstance(names, str):
        if names != "all":  # a bare name would be taken for a collection of letters
            raise LlamaError(f"{argument} is the str {names!r}; expected 'all' or a set of names, as {{{names!r}}}")
        return known
    return frozenset(names)


def find_names(names: Set[str], text: str) -> Iterator[re.Match[str]]:
    """The matches of any of `names` in `text`, from left to right."""
    return re.finditer("|".join(map(re.escape, sorted(names))), text) if names else iter(())
