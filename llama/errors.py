"""The project's own error, and what error messages show of texts that somebody else wrote.

Knows nothing of the other modules; all of them may raise it.
"""

from typing import Any


class LlamaError(ValueError):
    """A mistake in what was given to the library.

    The message is one line that is fit to be shown without a traceback: what was found, what was expected, what to do.
    """

    everywhere = False  # whether all ranks raise it together, so that one of them may show it for all
    # Of a call that answers several prompts: the completions of those that didn't fail, None in the places of others.
    answers: list[Any] | None = None


def make_printable(text: str) -> str:
    """`text` with U+FFFD for control characters, line ends, marks of direction, and bytes that are no characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def describe(value: object) -> str:
    """The type of a value and its beginning."""
    return f"{type(value).__name__} {shorten(value)}"


def shorten(value: object, width: int = 60) -> str:
    """The repr of a value, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def to_one_line(error: object) -> str:
    """An error of another library in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def pluralize(number: int, noun: str) -> str:
    """The number and the noun, with an s unless the number is 1."""
    return f"{number} {noun}{'s' * (number != 1)}"
