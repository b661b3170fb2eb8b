"""Questions about short made paragraphs, and where in them the answers stand: what a question answerer is trained on.

A paragraph is about a person, a thing or a town, and a question asks for one of the things that it says; for a fifth of
the questions it doesn't say. Knows nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from demo.facts import sections, sentence
from demo.templates import Part, allowed, fill, words

UNANSWERED = 0.2
KINDS = ("person", "person", "thing", "town")


@dataclass(frozen=True)
class Relation:
    """What can be said of something of this kind; the answer is the word in `slot`. {x} is the something."""

    kind: str
    slot: str
    statements: tuple[str, ...]  # all begin with "{x} "
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Stated:
    """A fact of a paragraph: its answer begins at character `start`."""

    relation: Relation
    answer: str
    start: int


@cache
def relations() -> list[Relation]:
    return [
        Relation(*head.split(), *(tuple(line.split(" / ")) for line in lines))  # type: ignore[arg-type]
        for head, lines in sections("question_sentences.txt")
    ]


def answers_of(relation: Relation, part: Part) -> list[str]:
    known = words(part.new_words)
    return known["woman"] + known["man"] if relation.slot == "owner" else known[relation.slot]


def named(kind: str, new: bool) -> list[str]:
    """What paragraphs of this kind are about."""
    known = words(new)
    if kind == "person":
        return known["woman"] + known["man"]
    return known["town"] if kind == "town" else [f"the {thing}" for thing in known["thing"]]


def paragraph(rng: Random, subject: str, about: Sequence[Relation], part: Part) -> tuple[str, list[Stated]]:
    """Two to four sentences, of a fact each; something that could be said isn't."""
    text = ""
    said: list[Stated] = []
    for relation in rng.sample(about, min(rng.choice((2, 3, 3, 4)), len(about) - 1)):
        template = rng.choice(allowed(relation.statements, part.new_templates))
        text += " " if text else ""
        for piece in fill(rng, template, {"x": [sentence(subject)], relation.slot: answers_of(relation, part)}):
            if piece.slot == relation.slot:
                said.append(Stated(relation, piece.text, len(text)))
            text += piece.text
    return text, said


def question(rng: Random, part: Part) -> dict:
    """{"question", "context", "answers": [{"text", "start"}]}: `start` counts characters; no answers: it isn't said."""
    kind = rng.choice(KINDS)
    subject = rng.choice(named(kind, part.new_words))
    about = [relation for relation in relations() if relation.kind == kind]
    context, said = paragraph(rng, subject, about, part)
    answers = []
    if rng.random() < UNANSWERED:
        relation = rng.choice([one for one in about if one not in [fact.relation for fact in said]])
    else:
        fact = rng.choice(said)
        relation = fact.relation
        answers = [{"text": fact.answer, "start": fact.start}]
    asked = rng.choice(allowed(relation.questions, part.new_templates)).replace("{x}", subject)
    return {"question": sentence(asked), "context": context, "answers": answers}
