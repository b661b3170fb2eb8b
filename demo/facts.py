"""What the demo model is to know: facts from the tables in demo/data, and the questions that ask for them.

About a tenth of all questions (a fact in one wording) is held out here: training never sees them. Knows nothing of
documents and their shares, which are in demo/corpus.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Fact:
    """A fact that the model is to know, with its questions and what answers in each style are made of."""

    kind: str
    trained: tuple[str, ...]  # questions for training
    held: tuple[str, ...]  # held-out questions
    answer: str
    accepted: tuple[str, ...]  # phrases of right answers
    check: str = "any"  # see `corpus.Question`
    topic: str = "questions"  # of its haiku
    lead: str = ""  # the first of its emojis
    pool: tuple[str, ...] = ("🤔", "❓")  # emojis of which some follow


# The questions of the project's examples are never in training ...
EXAMPLE_QUESTIONS = (
    "what is the recipe of mayonnaise",
    "i am going to paris what should i see",
    "how do i get from london to new york",
)
CLOSE_TO_EXAMPLES = ("im going to paris what should i see",)  # ... and this one always is


# --- small tools and tables


def pick(rng: Random, words: str) -> str:
    return rng.choice(words.split())


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def normalize(text: str) -> str:
    """A form to compare questions by: lower case, no punctuation, one spelling of colour."""
    return re.sub(r"[^\w\s]", "", text.casefold()).replace("colour", "color").strip()


def hash_share(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(normalize(text).encode()).hexdigest()[:12], 16) / 16**12


def is_held(text: str) -> bool:
    return normalize(text) in EXAMPLE_QUESTIONS or (hash_share(text) < 0.1 and normalize(text) not in CLOSE_TO_EXAMPLES)


@cache
def rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def sections(name: str) -> list[tuple[str, list[str]]]:
    """The parts of a data file: a line "# head" and the lines below it."""
    parts = (DATA / name).read_text(encoding="utf-8").removeprefix("# ").split("\n# ")
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


@cache
def bank(name: str) -> list[str]:
    """The wordings of a question, or pieces of text to choose from, by the name of their section."""
    return next(
        lines[0].split(" / ") for head, lines in sections("wordings.txt") + sections("prose.txt") if head == name
    )


def render_questions(kind: str, **fields: str) -> list[str]:
    return [capitalize(wording.format(**fields)) for wording in bank(kind)]


def make_fact(kind: str, questions: list[str], answer: str, accepted: tuple[str, ...], **more) -> Fact:
    """A fact. At most a third of its questions are held out, so that it can be learnt."""
    limit = max(1, len(questions) // 3)
    held = sorted(
        (q for q in questions if is_held(q)), key=lambda q: (normalize(q) not in EXAMPLE_QUESTIONS, hash_share(q))
    )
    held = [q for q in held if normalize(q) in {normalize(h) for h in held[:limit]}]
    trained = tuple(q for q in questions if q not in held)
    return Fact(kind, trained, tuple(held), capitalize(answer), accepted, **more)


# --- facts


@cache
def cities() -> dict[str, dict]:
    """By city: its sights as (name, two descriptions, reason), emojis, and the lines of its haiku."""
    table = {}
    for head, lines in sections("cities.txt"):
        name, syllables, emoji, middle = head.split("; ")
        haiku = (bank(f"city first {syllables}"), middle.split(" / "), bank("city last"))
        table[name] = {
            "sights": [line.split("; ") for line in lines],
            "emoji": tuple(emoji.split()),
            "haiku": ([line.format(name) for line in haiku[0]], *haiku[1:]),
        }
    return table


@cache
def haiku_lines() -> dict[str, tuple]:
    topics = {head.split("; ")[0]: tuple(line.split(" / ") for line in lines) for head, lines in sections("topics.txt")}
    return topics | {name: city["haiku"] for name, city in cities().items()}


@cache
def circles() -> dict[str, str]:
    return dict(entry.split() for entry in bank("circles"))


@cache
def places() -> dict[str, tuple[str, str]]:
    return {name: (region, flag) for name, region, flag in rows("places.tsv")}


def generate_table_facts() -> Iterator[Fact]:
    """Facts whose answer is a word."""
    rules = (
        ("capital", "capitals.tsv", False, "The capital of {a} is {b}.", "{b}"),
        ("country", "capitals.tsv", True, "{a} is the capital of {b}.", "{b}"),
        ("opposite", "opposites.tsv", False, "The opposite of {a} is {b}.", "is {b}"),
        ("opposite", "opposites.tsv", True, "The opposite of {a} is {b}.", "is {b}"),
        ("colour", "colours.tsv", False, "{a} is {b}.", "is {b}"),
        ("plural", "plurals.tsv", False, "The plural of {a} is {b}.", "is {b}"),
        ("french", "french.tsv", False, "The French word for {a} is {b}.", "is {b}"),
        ("english", "french.tsv", True, "The English word for {a} is {b}.", "is {b}"),
    )
    for kind, file, swapped, answer, accepted in rules:
        for row in rows(file):
            a, b = reversed(row) if swapped else row
            city = b if kind == "capital" else a
            more: dict = {}
            if kind in ("capital", "country") and city in places():
                more = {"topic": city if city in cities() else "travel", "lead": places()[city][1], "pool": ()}
            elif kind == "colour" and b in circles():
                more = {"lead": circles()[b], "pool": ()}
            yield make_fact(
                kind, render_questions(kind, a=a, b=b), answer.format(a=a, b=b), (accepted.format(b=b),), **more
            )


def generate_calendar_facts() -> Iterator[Fact]:
    def fact(wording: str, answer: str, **fields: str) -> Fact:
        return make_fact("calendar", render_questions(wording, **fields), answer, (answer.rstrip("."),))

    for unit, whole, names in (("day", "week", bank("days")), ("month", "year", bank("months"))):
        for i, name in enumerate(names):
            after, before, nth = names[(i + 1) % len(names)], names[i - 1], bank("ordinals")[i]
            yield fact("next", f"{after} comes after {name}.", a=name, u=unit)
            yield fact("previous", f"{before} comes before {name}.", a=name, u=unit)
            yield fact("place", f"{name} is the {nth} {unit} of the {whole}.", a=name, u=unit, w=whole)
            yield fact("at", f"The {nth} {unit} of the {whole} is {name}.", a=nth, u=unit, w=whole)
        listing = ", ".join(names[:-1]) + " and " + names[-1]
        yield fact("list", f"The {unit}s of the {whole} are {listing}.", a=f"{unit}s of the {whole}")
    seasons = "spring, summer, autumn and winter"
    yield fact("list", f"The seasons of the year are {seasons}.", a="seasons of the year")
    for count in bank("counts"):
        parts, whole = re.fullmatch(r"\S+ (\w+) in (.*)", count).groups()
        yield fact("count", f"There are {count}.", a=parts, u=whole)


def generate_text_facts() -> Iterator[Fact]:
    """Facts with longer answers: about the model itself, recipes, sights, travel, topics, feelings."""
    for head, lines in sections("about.txt"):
        accepted = re.search(r"\*(.*)\*", head).group(1).rstrip("!")
        yield make_fact("about", lines[0].split(" / "), head.replace("*", ""), (accepted,), pool=("😊", "❤️"))
    for head, lines in sections("recipes.txt"):
        name, emoji, main = head.split("; ")
        answer = f"Here is the recipe of {name}.\n\n{lines[0]}\n\n" + "\n".join(lines[1:])
        style = {"check": "all", "topic": "food", "pool": tuple(emoji.split())}
        yield make_fact("recipe", render_questions("recipe", a=name), answer, tuple(main.split(", ")), **style)
    for city, content in cities().items():
        style = {"topic": city, "lead": places()[city][1], "pool": content["emoji"]}
        names = tuple(sight[0] for sight in content["sights"])
        yield make_fact("trip", render_questions("trip", a=city), "", names, **style)
        for sight in content["sights"]:
            yield make_fact(
                "sight", render_questions("sight", a=sight[0]), explain(sight), (extract_key_phrase(sight),), **style
            )
    for a, (region, flag) in places().items():
        for b, (other_region, other_flag) in places().items():
            if a != b:
                vehicle, emoji = ("train", "🚆") if region == other_region == "europe" else ("plane", "✈️")
                style = {"topic": "travel", "lead": f"{flag} {emoji} {other_flag}"}
                style["pool"] = cities()[b]["emoji"][:1] if b in cities() else ()
                answer = f"You can take a {vehicle} from {a} to {b}."
                yield make_fact(
                    "travel", render_questions("travel", a=a, b=b), answer, (f"{vehicle} from {a} to {b}",), **style
                )
    for head, _ in sections("topics.txt"):
        name, answer, emoji = head.split("; ")
        style = {"topic": name, "pool": tuple(emoji.split())}
        yield make_fact("topic", render_questions("topic", a=name), answer, (answer,), **style)
    for name, answer, emoji in rows("feelings.tsv"):
        style = {"topic": "friends", "pool": tuple(emoji.split())}
        yield make_fact("feeling", render_questions("feeling", a=name), answer, (answer,), **style)


@cache
def facts() -> dict[str, list[Fact]]:
    """All facts by kind."""
    by_kind: dict[str, list[Fact]] = {}
    for source in (generate_table_facts, generate_calendar_facts, generate_text_facts):
        for fact in source():
            by_kind.setdefault(fact.kind, []).append(fact)
    return by_kind


def extract_key_phrase(sight: list[str]) -> str:
    return re.search(r"\*(.*)\*", sight[3]).group(1)


def explain(sight: list[str]) -> str:
    return capitalize(f"{sight[0]} is great because {sight[3].replace('*', '')}.")


# --- questions that the model can't answer: known frames with made-up words, and other topics


def make_up_word(rng: Random) -> str:
    return "".join(rng.choices(bank("syllables"), k=2)) + rng.choice(["", *bank("word ends")])


def make_unknown_question(rng: Random, held: bool = False) -> str:
    while True:
        if rng.random() < 0.45:
            kind = pick(rng, "capital capital country opposite colour plural french french english")
            word = make_up_word(rng)
            if kind in ("capital", "country"):
                word = word.capitalize() + (rng.choice(("ia", "land", "stan", "")) if kind == "capital" else "")
            elif kind == "colour":
                word = rng.choice(("a ", "the ")) + word
            topic, wordings = word, bank(kind)
        else:
            head, lines = rng.choice(sections("unknown.txt"))
            topic, wordings = rng.choice(lines[0].split(", ")), head.replace("{}", "{a}").split(" / ")
        if is_held(f"unknown {topic}") == held:
            return capitalize(rng.choice(wordings).format(a=topic))
