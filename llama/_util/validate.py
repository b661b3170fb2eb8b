"""Checks of arguments. Each raises LlamaError with the argument's name, its value and what was expected.

Knows plain values; knows no sizes of a model, no tokens and no files.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from ..errors import LlamaError, describe, shorten

LARGEST_COUNT = 1 << 53  # larger ones overflow what is computed of them


def is_number(value: object) -> bool:
    """Whether it is a finite number: no bool, no nan, and no integer that is too large for a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether it is a whole number of at least `least`; a bool isn't."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def suggest(name: str, known: Collection[str], prefix: str = "", similarity: float = 0.6) -> str:
    """For the end of a message: the known name that is most like this one; "" if none is as similar as that."""
    close = get_close_matches(name.lower(), known, 1, similarity)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def check_count(name: str, value: Any) -> None:
    if is_integer(value, LARGEST_COUNT + 1):  # Python writes no integer of thousands of digits, so its bits are counted
        raise LlamaError(f"{name} is an integer of {int(value).bit_length()} bits, expected at most 2^53")
    if not is_integer(value, 1):
        raise LlamaError(f"{name} is {shorten(value)}, expected a whole number of at least 1")


def check_seed(seed: object) -> None:
    if not is_integer(seed):
        raise LlamaError(f"seed is {shorten(seed)}, expected a whole number")


def check_list(name: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        raise LlamaError(
            f"{name} is a {type(value).__name__}, expected a list of entries, one for each row of the batch"
        )


def check_dialogs(dialogs: Sequence) -> None:
    """Check that there is a list of dialogs, and not one dialog, which is a list of messages."""
    check_list("dialogs", dialogs)
    if any(isinstance(dialog, Mapping) for dialog in dialogs):
        raise LlamaError(
            "dialogs is a list of messages, expected a list of dialogs: put the one dialog into a list, [dialog]"
        )
    for dialog in dialogs:
        check_dialog(dialog)


def check_dialog(dialog: object) -> None:
    """Check that it is a list, and not empty."""
    if not isinstance(dialog, list | tuple):
        raise LlamaError(f"a dialog is {describe(dialog)}; expected a list of messages")
    if not dialog:
        raise LlamaError("the dialog is empty; expected at least one message")


def refuse_options(dialog: object, **options: object) -> None:
    """Raise LlamaError for options, of a function that could use some and uses none."""
    if options:
        raise LlamaError(f"{', '.join(options)}: this ChatFormat writes messages alone; take Llama.formatter instead")


def check_texts(texts: Sequence[str], name: str = "prompt") -> None:
    """Check that there is a list of texts, none of them empty. name: what to call one of them."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        shown = repr(texts)
        raise LlamaError(f"{name}s is {shown[:60]}{'...' * (len(shown) > 60)}, expected a list of strings")
    if "" in texts:
        raise LlamaError(f"{name} {list(texts).index('')} is empty: give it at least one character")
