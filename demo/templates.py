"""Sentences from templates with slots and lists of words; every sixth of both is put aside for the examination.

Templates are in demo/data/*_sentences.txt, words in demo/data/words.txt. Knows nothing of what the sentences are for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple, TypeVar

from demo.facts import cities, places, rows, sections

T = TypeVar("T")

EVERY = 6


@dataclass(frozen=True)
class Part:
    """From which templates and words a text is made: those that training sees, or those put aside."""

    new_templates: bool = False
    new_words: bool = False


SEEN = Part()
PARTS = (SEEN, Part(new_templates=True), Part(new_words=True), Part(new_templates=True, new_words=True))


class Piece(NamedTuple):
    """A stretch of a sentence: what fills the slot of this name, or the template's own text, whose slot is ""."""

    text: str
    slot: str = ""


def allowed(items: Sequence[T], new: bool) -> list[T]:
    return [item for i, item in enumerate(items) if (i % EVERY == EVERY - 1) == new]


@cache
def lists() -> dict[str, list[str]]:
    """All words, by the slot that they fit."""
    found = {head: lines[0].split(" / ") for head, lines in sections("words.txt")}
    known = [city for _, city in rows("capitals.tsv")] + [*cities(), *places()]
    found["city"] = list(dict.fromkeys(known + found["city"]))
    found["country"] = [country for country, _ in rows("capitals.tsv")]
    return found


@cache
def words(new: bool) -> dict[str, list[str]]:
    return {slot: allowed(every, new) for slot, every in lists().items()}


def fill(rng: Random, template: str, choices: Mapping[str, Sequence[str]]) -> list[Piece]:
    """The template with a word in each slot, never the same one twice while there are others."""
    pieces: list[Piece] = []
    for i, text in enumerate(re.split(r"[{}]", template)):
        if i % 2:
            taken = {piece.text for piece in pieces}
            unused = [word for word in choices[text] if word not in taken]
            pieces.append(Piece(rng.choice(unused or choices[text]), text))
        elif text:
            pieces.append(Piece(text))
    return pieces
