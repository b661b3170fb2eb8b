"""Which sequence each row of a forward pass is, for hooks that look at the rows.

Knows no model and no tensor.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from .sequence import Sequence as TokenSequence

CURRENT: ContextVar[tuple[TokenSequence, ...]] = ContextVar("rows of the pass", default=())


def rows() -> tuple[TokenSequence, ...]:
    """Inside of a hook on a layer: the sequence of each row of the pass that runs, whose `index` is its `Step.row`.

    Empty in a pass that no engine runs, such as a call of the model by hand.
    """
    return CURRENT.get()


@contextlib.contextmanager
def show_rows(sequences: Sequence[TokenSequence]) -> Iterator[None]:
    token = CURRENT.set(tuple(sequences))
    try:
        yield
    finally:
        CURRENT.reset(token)
