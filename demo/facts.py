"""What the demo model shall know: facts from the tables in demo/data, and the questions that ask for them.

About a tenth of all questions (a fact in one wording) is put aside here, for good: training never sees it.
Knows nothing of documents or of how often what occurs; those are demo/corpus.py.
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
    """Something the model shall know: the questions for it, rendered, and the answer in the three styles."""

    kind: str
    trained: tuple[str, ...]  # questions for training
    held: tuple[str, ...]  # questions put aside
    answer: str
    accepted: tuple[str, ...]
    check: str = "any"
    topic: str = "questions"  # of its haiku
    lead: str = ""  # its emojis: first these,
    pool: tuple[str, ...] = ("🤔", "❓")  # then some of these


# Never in training: the questions that the project shows as its examples ...
EXAMPLE_QUESTIONS = (
    "what is the recipe of mayonnaise",
    "i am going to paris what should i see",
    "how do i get from london to new york",
)
CLOSE_TO_EXAMPLES = ("im going to paris what should i see",)  # ... and always: this one


# --- Small tools.


def pick(rng: Random, words: str) -> str:
    return rng.choice(words.split())


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """For comparing questions: lower case, no punctuation, one spelling of colour."""
    return re.sub(r"[^\w\s]", "", text.casefold()).replace("colour", "color").strip()


def share(text: str) -> float:
    """A stable pseudo-random number in [0, 1) for a text."""
    return int(hashlib.sha256(plain(text).encode()).hexdigest()[:12], 16) / 16**12


def is_held(text: str) -> bool:
    return plain(text) in EXAMPLE_QUESTIONS or (share(text) < 0.1 and plain(text) not in CLOSE_TO_EXAMPLES)


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


def asked(kind: str, **fields: str) -> list[str]:
    return [sentence(wording.format(**fields)) for wording in bank(kind)]


def make_fact(kind: str, questions: list[str], answer: str, accepted: tuple[str, ...], **more) -> Fact:
    """At most a third of the questions are held out, so that each fact is learnt."""
    limit = max(1, len(questions) // 3)
    held = sorted((q for q in questions if is_held(q)), key=lambda q: (plain(q) not in EXAMPLE_QUESTIONS, share(q)))
    held = [q for q in held if plain(q) in {plain(h) for h in held[:limit]}]
    trained = tuple(q for q in questions if q not in held)
    return Fact(kind, trained, tuple(held), sentence(answer), accepted, **more)


# --- The facts.


@cache
def cities() -> dict[str, dict]:
    """Per city: its sights as (name, two descriptions, reason), emojis, and the lines of its haiku."""
    found = {}
    for head, lines in sections("cities.txt"):
        name, syllables, emoji, middle = head.split("; ")
        haiku = (bank(f"city first {syllables}"), middle.split(" / "), bank("city last"))
        found[name] = {
            "sights": [line.split("; ") for line in lines],
            "emoji": tuple(emoji.split()),
            "haiku": ([line.format(name) for line in haiku[0]], *haiku[1:]),
        }
    return found


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


def table_facts() -> Iterator[Fact]:
    """The facts with one word as their answer."""
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
            yield make_fact(kind, asked(kind, a=a, b=b), answer.format(a=a, b=b), (accepted.format(b=b),), **more)


def calendar_facts() -> Iterator[Fact]:
    def fact(wording: str, answer: str, **fields: str) -> Fact:
        return make_fact("calendar", asked(wording, **fields), answer, (answer.rstrip("."),))

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


def text_facts() -> Iterator[Fact]:
    """The facts with longer answers: about the model itself, recipes, sights, travel, topics, feelings."""
    for head, lines in sections("about.txt"):
        accepted = re.search(r"\*(.*)\*", head).group(1).rstrip("!")
        yield make_fact("about", lines[0].split(" / "), head.replace("*", ""), (accepted,), pool=("😊", "❤️"))
    for head, lines in sections("recipes.txt"):
        name, emoji, main = head.split("; ")
        answer = f"Here is the recipe of {name}.\n\n{lines[0]}\n\n" + "\n".join(lines[1:])
        style = {"check": "all", "topic": "food", "pool": tuple(emoji.split())}
        yield make_fact("recipe", asked("recipe", a=name), answer, tuple(main.split(", ")), **style)
    for city, content in cities().items():
        style = {"topic": city, "lead": places()[city][1], "pool": content["emoji"]}
        names = tuple(sight[0] for sight in content["sights"])
        yield make_fact("trip", asked("trip", a=city), "", names, **style)
        for sight in content["sights"]:
            yield make_fact("sight", asked("sight", a=sight[0]), why(sight), (key_phrase(sight),), **style)
    for a, (region, flag) in places().items():
        for b, (other_region, other_flag) in places().items():
            if a != b:
                vehicle, emoji = ("train", "🚆") if region == other_region == "europe" else ("plane", "✈️")
                style = {"topic": "travel", "lead": f"{flag} {emoji} {other_flag}"}
                style["pool"] = cities()[b]["emoji"][:1] if b in cities() else ()
                answer = f"You can take a {vehicle} from {a} to {b}."
                yield make_fact("travel", asked("travel", a=a, b=b), answer, (f"{vehicle} from {a} to {b}",), **style)
    for head, _ in sections("topics.txt"):
        name, answer, emoji = head.split("; ")
        style = {"topic": name, "pool": tuple(emoji.split())}
        yield make_fact("topic", asked("topic", a=name), answer, (answer,), **style)
    for name, answer, emoji in rows("feelings.tsv"):
        style = {"topic": "friends", "pool": tuple(emoji.split())}
        yield make_fact("feeling", asked("feeling", a=name), answer, (answer,), **style)


@cache
def facts() -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = {}
    for source in (table_facts, calendar_facts, text_facts):
        for fact in source():
            found.setdefault(fact.kind, []).append(fact)
    return found


def key_phrase(sight: list[str]) -> str:
    return re.search(r"\*(.*)\*", sight[3]).group(1)


def why(sight: list[str]) -> str:
    return sentence(f"{sight[0]} is great because {sight[3].replace('*', '')}.")


# --- Questions that the model cannot answer: known frames with made-up words, and other topics.


def made_up_word(rng: Random) -> str:
    return "".join(rng.choices(bank("syllables"), k=2)) + rng.choice(["", *bank("word ends")])


def unknown_question(rng: Random, held: bool = False) -> str:
    while True:
        if rng.random() < 0.45:
            kind = pick(rng, "capital capital country opposite colour plural french french english")
            word = made_up_word(rng)
            if kind in ("capital", "country"):
                word = word.capitalize() + (rng.choice(("ia", "land", "stan", "")) if kind == "capital" else "")
            elif kind == "colour":
                word = rng.choice(("a ", "the ")) + word
            topic, wordings = word, bank(kind)
        else:
            head, lines = rng.choice(sections("unknown.txt"))
            topic, wordings = rng.choice(lines[0].split(", ")), head.replace("{}", "{a}").split(" / ")
        if is_held(f"unknown {topic}") == held:
            return sentence(rng.choice(wordings).format(a=topic))
