"""Checks of arguments. Each raises LlamaError with the argument's name, its value and what was expected.

Knows plain values; knows no sizes of a model, no tokens and no files.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import LlamaError


def is_number(value: object) -> bool:
    """Whether it is a finite number: no bool, no nan, and no integer that is too large for a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether it is a whole number of at least `least`; a bool isn't."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_count(name: str, value: Any) -> None:
    if not is_integer(value, 1):
        raise LlamaError(f"{name} is {value!r}, expected a whole number of at least 1")


def check_seed(seed: object) -> None:
    if not is_integer(seed):
        raise LlamaError(f"seed is {seed!r}, expected a whole number")


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


def check_texts(texts: Sequence[str], name: str = "prompt") -> None:
    """Check that there is a list of texts, none of them empty. name: what to call one of them."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        shown = repr(texts)
        raise LlamaError(f"{name}s is {shown[:60]}{'...' * (len(shown) > 60)}, expected a list of strings")
    if "" in texts:
        raise LlamaError(f"{name} {list(texts).index('')} is empty: give it at least one character")
