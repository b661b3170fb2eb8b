"""The project's own error: what a user did, said in one line; and what of a stranger's text may be shown.

Knows nothing of the other rooms; all of them may raise it.
"""


class LlamaError(ValueError):
    """A mistake in what was given to the library: what was found, what was expected, what to do.

    The message is one line, fit to be shown without a traceback. `everywhere` says that all ranks raise it together, so
    that one of them may tell it for all.
    """

    everywhere = False


def printable(text: str) -> str:
    """One line, with U+FFFD for controls, marks of direction, and bytes of names that are no characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def kind_of(value: object) -> str:
    return f"{type(value).__name__} {shortened(value)}"


def shortened(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def one_line(error: object) -> str:
    """What a stranger's error says, in one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
