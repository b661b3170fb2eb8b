"""What one step of the engine does, as the scheduler decides it: data alone.

Releases are carried out first, then the copies in their order, then the passes: one with the pieces, one with the rows.
Knows no tensors; a request is its key, a place in the cache is a slot and a position.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class SlotCopy:
    """The first `length` positions of slot `source` go to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class SlotRelease:
    """What slot `slot` holds from position `start` on isn't needed any more: its memory is free."""

    slot: int
    start: int


@dataclass(frozen=True)
class Piece:
    """A piece of a request's text is read: its tokens[start:end] go into its slot."""

    key: int
    slot: int
    start: int
    end: int
    is_last: bool  # `end` is the end of the text: the next token is chosen from the last state


class Row(NamedTuple):
    """A decoding request feeds the last token of its text, at position `start`, and at most count - 1 proposals.

    A frozen dataclass takes twice as long to make, which at 64 rows is a third of what a plan takes.
    """

    key: int
    slot: int
    start: int
    count: int  # type: ignore[assignment] # tuple.count gives way


@dataclass(frozen=True)
class StepPlan:
    """One step. Pieces and rows are in order of key; no request is among both."""

    releases: tuple[SlotRelease, ...] = ()
    copies: tuple[SlotCopy, ...] = ()
    pieces: tuple[Piece, ...] = ()
    rows: tuple[Row, ...] = ()
    set_back: tuple[int, ...] = ()  # keys that lost their slot; they wait, and are read again from their first token
