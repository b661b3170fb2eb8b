"""Questions about short made paragraphs, and where in them the answers stand: what a question answerer is trained on.

A paragraph is about two people, things or towns; a question is about one of them, and for a fifth of the questions the
paragraph doesn't say. Knows nothing of files.
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

    subject: str
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


def paragraph(rng: Random, subjects: Sequence[str], about: Sequence[Relation], part: Part) -> tuple[str, list[Stated]]:
    """Two to four sentences, of a fact each, about these subjects."""
    text = ""
    said: list[Stated] = []
    facts = [(subject, relation) for subject in subjects for relation in about]
    for subject, relation in rng.sample(facts, rng.choice((2, 3, 3, 4))):
        template = rng.choice(allowed(relation.statements, part.new_templates))
        unused = [word for word in answers_of(relation, part) if word not in (fact.answer for fact in said)]
        text += " " if text else ""
        for piece in fill(rng, template, {"x": [sentence(subject)], relation.slot: unused}):
            if piece.slot == relation.slot:
                said.append(Stated(subject, relation, piece.text, len(text)))
            text += piece.text
    return text, said


def question(rng: Random, part: Part) -> dict:
    """{"question", "context", "answers": [{"text", "start"}]}: `start` counts characters; no answers: it isn't said."""
    kind = rng.choice(KINDS)
    subjects = rng.sample(named(kind, part.new_words), 2)
    about = [relation for relation in relations() if relation.kind == kind]
    context, said = paragraph(rng, subjects, about, part)
    answers = []
    if rng.random() < UNANSWERED:
        known = [(fact.subject, fact.relation) for fact in said]
        free = [(s, r) for s in subjects for r in about if (s, r) not in known]
        close = [(s, r) for s, r in free if any(r == relation for _, relation in known)]  # said of the other
        subject, relation = rng.choice(close if close and rng.random() < 0.7 else free)
    else:
        fact = rng.choice(said)
        subject, relation = fact.subject, fact.relation
        answers = [{"text": fact.answer, "start": fact.start}]
    asked = rng.choice(allowed(relation.questions, part.new_templates)).replace("{x}", subject)
    return {"question": sentence(asked), "context": context, "answers": answers}
