"""The project's own error: what a user did, said in one line.

Knows nothing of the other rooms; all of them may raise it.
"""


class LlamaError(ValueError):
    """A mistake in what was given to the library: what was found, what was expected, what to do.

    The message is one line, fit to be shown without a traceback. `everywhere` says that all ranks raise it together, so
    that one of them may tell it for all.
    """

    everywhere = False
