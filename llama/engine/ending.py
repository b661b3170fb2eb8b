"""How another thread ends what only reads: texts whose states are wanted, or the beams of a search.

Knows sequences and the engine that reads them; knows no result.
"""

from collections.abc import Sequence

from ..errors import LlamaError
from .engine import Engine
from .sequence import Sequence as TokenSequence


class Ending:
    """Ends a search, or the reading of texts, from another thread, on the rank that leads."""

    def __init__(self) -> None:
        self._is_wanted = True
        self._texts: Sequence[TokenSequence] = ()  # that are read now

    def end(self, engine: Engine) -> None:
        """Nothing more is read: what goes on raises LlamaError."""
        self._is_wanted = False
        for text in self._texts:
            engine.cancel(text)
        engine.notice_taken()

    def check(self, texts: Sequence[TokenSequence]) -> None:
        """Raise LlamaError if it was ended. texts: those that are read next."""
        self._texts = texts
        if not self._is_wanted:
            raise LlamaError("what was asked for was ended")
