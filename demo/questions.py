"""Questions about short paragraphs, with the answers' positions in them, to train a question answerer on.

A paragraph is about a person, a thing or a town, and a question asks for one of its facts. A fifth of the questions
have no answer in their paragraph. Knows nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from demo.facts import capitalize, sections
from demo.templates import Part, fill_slots, select, words

UNANSWERED = 0.2  # the share of questions without an answer
KINDS = ("person", "person", "thing", "town")


@dataclass(frozen=True)
class Relation:
    """What can be stated about a subject of some kind, and asked. {x} is the subject."""

    kind: str  # of the subject
    slot: str  # whose word is the answer
    statements: tuple[str, ...]  # all begin with "{x} "
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Stated:
    """A fact of a paragraph."""

    relation: Relation
    answer: str
    start: int  # the character at which the answer begins


@cache
def relations() -> list[Relation]:
    return [
        Relation(*head.split(), *(tuple(line.split(" / ")) for line in lines))  # type: ignore[arg-type]
        for head, lines in sections("question_sentences.txt")
    ]


def list_answers(relation: Relation, part: Part) -> list[str]:
    choices = words(part.new_words)
    return choices["woman"] + choices["man"] if relation.slot == "owner" else choices[relation.slot]


def list_subjects(kind: str, new: bool) -> list[str]:
    """What paragraphs of this kind are about."""
    choices = words(new)
    if kind == "person":
        return choices["woman"] + choices["man"]
    return choices["town"] if kind == "town" else [f"the {thing}" for thing in choices["thing"]]


def write_paragraph(rng: Random, subject: str, about: Sequence[Relation], part: Part) -> tuple[str, list[Stated]]:
    """Two to four sentences, a fact each, and these facts. At least one of the relations is left out."""
    text = ""
    said: list[Stated] = []
    for relation in rng.sample(about, min(rng.choice((2, 3, 3, 4)), len(about) - 1)):
        template = rng.choice(select(relation.statements, part.new_templates))
        text += " " if text else ""
        for piece in fill_slots(
            rng, template, {"x": [capitalize(subject)], relation.slot: list_answers(relation, part)}
        ):
            if piece.slot == relation.slot:
                said.append(Stated(relation, piece.text, len(text)))
            text += piece.text
    return text, said


def make_question_record(rng: Random, part: Part) -> dict:
    """{"question", "context", "answers": [{"text", "start"}]}: `start` counts characters; [] if there is no answer."""
    kind = rng.choice(KINDS)
    subject = rng.choice(list_subjects(kind, part.new_words))
    about = [relation for relation in relations() if relation.kind == kind]
    context, said = write_paragraph(rng, subject, about, part)
    answers = []
    if rng.random() < UNANSWERED:
        relation = rng.choice([unsaid for unsaid in about if unsaid not in [fact.relation for fact in said]])
    else:
        fact = rng.choice(said)
        relation = fact.relation
        answers = [{"text": fact.answer, "start": fact.start}]
    question = rng.choice(select(relation.questions, part.new_templates)).replace("{x}", subject)
    return {"question": capitalize(question), "context": context, "answers": answers}
