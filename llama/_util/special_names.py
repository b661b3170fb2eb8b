"""Names of control tokens in a text: which of them become tokens, and which may not stand there.

Knows strings only.
"""

import re
from collections.abc import Collection, Iterator, Set
from typing import Literal

from ..errors import LlamaError, describe, shorten


def check_special(
    s: str,
    special_names: Set[str],
    allowed_special: Literal["all"] | Collection[str],
    disallowed_special: Literal["all"] | Collection[str],
) -> Set[str]:
    """The names that become control tokens in `s`.

    special_names: of all control tokens of the tokenizer. Other arguments, and errors, as in `Tokenizer.encode`.
    """
    if not isinstance(s, str):
        raise LlamaError(f"text to encode is {describe(s)}; expected str")
    allowed, disallowed = (
        _resolve_names(names, special_names, argument)
        for names, argument in ((allowed_special, "allowed_special"), (disallowed_special, "disallowed_special"))
    )
    allowed &= special_names
    if disallowed_special == "all":
        disallowed -= allowed
    if match := next(find_names(disallowed, s), None):
        raise LlamaError(
            f"text contains the control token {shorten(match[0])} at character {match.start()}, which "
            "disallowed_special forbids; remove it from the text, or put it in allowed_special"
        )
    return allowed


def _resolve_names(names: Literal["all"] | Collection[str], special_names: Set[str], argument: str) -> Set[str]:
    if isinstance(names, str):
        if names != "all":  # a bare name would be taken for a collection of letters
            raise LlamaError(
                f"{argument} is the str {shorten(names)}; expected 'all' or a set of names, as {{{shorten(names)}}}"
            )
        return special_names
    return frozenset(names)


def find_names(names: Set[str], text: str) -> Iterator[re.Match[str]]:
    """The matches of any of `names` in `text`, from left to right."""
    return re.finditer("|".join(map(re.escape, sorted(names))), text) if names else iter(())
