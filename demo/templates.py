"""Sentences from templates with slots and lists of words. Every sixth template and word is held out from training.

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

EVERY = 6  # one of so many templates and words is held out


@dataclass(frozen=True)
class Part:
    """Which templates and words a text is made from."""

    new_templates: bool = False  # held-out templates, in place of those that training sees
    new_words: bool = False  # held-out words, in place of those that training sees


SEEN = Part()
PARTS = (SEEN, Part(new_templates=True), Part(new_words=True), Part(new_templates=True, new_words=True))


class Piece(NamedTuple):
    """A part of a sentence."""

    text: str
    slot: str = ""  # the name of the slot that it fills; "": it is the template's own text


def select(items: Sequence[T], new: bool) -> list[T]:
    """The held-out items if `new`, else those that training sees."""
    return [item for i, item in enumerate(items) if (i % EVERY == EVERY - 1) == new]


@cache
def word_lists() -> dict[str, list[str]]:
    """All words by the slot that they fit."""
    lists = {head: lines[0].split(" / ") for head, lines in sections("words.txt")}
    of_facts = [city for _, city in rows("capitals.tsv")] + [*cities(), *places()]
    lists["city"] = list(dict.fromkeys(of_facts + lists["city"]))
    lists["country"] = [country for country, _ in rows("capitals.tsv")]
    return lists


@cache
def words(new: bool) -> dict[str, list[str]]:
    """The held-out words by slot if `new`, else those that training sees."""
    return {slot: select(every, new) for slot, every in word_lists().items()}


def fill_slots(rng: Random, template: str, choices: Mapping[str, Sequence[str]]) -> list[Piece]:
    """The template with a word in each slot. No word occurs twice while there are others."""
    pieces: list[Piece] = []
    for i, text in enumerate(re.split(r"[{}]", template)):
        if i % 2:
            used = {piece.text for piece in pieces}
            unused = [word for word in choices[text] if word not in used]
            pieces.append(Piece(rng.choice(unused or choices[text]), text))
        elif text:
            pieces.append(Piece(text))
    return pieces
