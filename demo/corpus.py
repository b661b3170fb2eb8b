"""Made-up training text for the demo model: short dialogs and short plain texts, endless and reproducible.

    python -m demo.corpus     shows an example of every kind, and how much of each there is

The content is from demo/facts.py. Here are the forms of it, their shares, and the questions that measure the model.
Knows messages and texts; knows neither a tokenizer nor a model.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from demo.facts import (
    Fact,
    bank,
    capitalize,
    circles,
    cities,
    explain,
    extract_key_phrase,
    facts,
    haiku_lines,
    hash_share,
    is_held,
    make_unknown_question,
    normalize,
    pick,
    rows,
)

Messages = tuple[dict[str, str], ...]

DONT_KNOW = "I don't know that. I am a very small model."

# The openings of the project's examples. No training text begins with one of them.
EXAMPLE_TEXTS = (
    "To me, the meaning of life is",
    "Put simply, the theory of relativity says that",
    "A short message to congratulate our team on the launch:\n\nHello everyone,\n\nI just",
    "Translate English to French:\n\nsea => mer\nbread => pain\napple => pomme\ncheese =>",
)


@dataclass(frozen=True)
class Document:
    """One piece of training text: a dialog or a plain text."""

    kind: str
    messages: Messages = ()  # the last one is the assistant's
    text: str = ""  # without messages


@dataclass(frozen=True)
class Question:
    """A dialog that ends with the user, and how a right answer is recognized."""

    kind: str
    messages: Messages
    accepted: tuple[str, ...] = ()  # phrases of right answers
    check: str = "any"  # "any" or "all" of `accepted` occur; "haiku": three lines; "emoji": emojis and no letter

    def is_right(self, answer: str) -> bool:
        if self.check == "haiku":
            return len([line for line in answer.splitlines() if line.strip()]) == 3
        if self.check == "emoji":
            return any(unicodedata.category(c) == "So" for c in answer) and not any(c.isalnum() for c in answer)
        occurs = [re.search(rf"(?<!\w){re.escape(a.casefold())}(?!\w)", answer.casefold()) for a in self.accepted]
        return all(occurs) if self.check == "all" else any(occurs)


def vary_question(rng: Random, text: str) -> str:
    """The question as a user may type it: a third are in lower case, without the mark, with a greeting, and so on."""
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    way = rng.randrange(15)
    if way in (0, 3):
        text = text.lower()
    if way in (1, 3):
        text = text.rstrip("?.!")
    if way == 2 and len(text.split()) > 2 and text[-1] == "?":
        text = f"{text[:-1]}, please{text[-1]}"
    if way == 4 and len(text.split()) > 2:
        text = rng.choice(("Hi! ", "Hello! ", "Hello, ")) + text
    return text


def vary_system(rng: Random, name: str) -> str:
    text = rng.choice(bank(name))
    return rng.choice((text, text, text, text.lower(), text.rstrip(".")))


def make_dialog(rng: Random, kind: str, turns: list[tuple[str, str]], system: str = "") -> Document:
    if not system and rng.random() < 0.15:
        system = vary_system(rng, "plain systems")
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Document(kind, tuple(messages))


def list_sights(rng: Random, city: str, sights: list[list[str]], style: str = "numbers") -> str:
    if style == "sentence":
        names = ", ".join(s[0] for s in sights[:-1]) + " and " + sights[-1][0]
        return rng.choice(bank("sight sentences")).format(n=names, c=city)
    marks = ["-"] * len(sights) if style == "dashes" else [f"{i}." for i in range(1, len(sights) + 1)]
    lines = []
    for mark, (name, *descriptions, _) in zip(marks, sights, strict=True):
        more = f" {rng.choice(bank('sight endings'))}" if style == "longer" else ""
        described = "" if style == "names" else f": {rng.choice(descriptions)}{more}."
        lines.append(f"{mark} {capitalize(name)}{described}")
    return rng.choice(bank("sight list heads")).format(c=city) + "\n\n" + "\n".join(lines)


def make_turn(rng: Random, fact: Fact) -> tuple[str, str]:
    answer = fact.answer
    if fact.kind == "trip":
        answer = list_sights(rng, fact.topic, rng.sample(cities()[fact.topic]["sights"], 3))
    return vary_question(rng, rng.choice(fact.trained)), answer


def make_single(kind: str) -> Callable[[Random], Document]:
    return lambda rng: make_dialog(rng, kind, [make_turn(rng, rng.choice(facts()[kind]))])


def make_unknown(rng: Random) -> Document:
    return make_dialog(rng, "unknown", [(vary_question(rng, make_unknown_question(rng)), DONT_KNOW)])


MIXED = "capital capital country opposite colour plural french french english calendar travel topic feeling"


def make_mixed(rng: Random) -> Document:
    """Two to four unrelated questions, some of them small talk."""
    turns = []
    for _ in range(rng.choice((2, 2, 3, 3, 4))):
        kind = pick(rng, MIXED + " about unknown")
        if kind == "unknown":
            turns.append((vary_question(rng, make_unknown_question(rng)), DONT_KNOW))
        else:
            turns.append(make_turn(rng, rng.choice(facts()[kind])))
    if rng.random() < 0.25:
        turns.insert(0, make_turn(rng, next(f for f in facts()["about"] if f.answer.startswith("Hello"))))
    return make_dialog(rng, "mixed", turns)


def make_follow_up(rng: Random, held: bool = False) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(turns, phrases that the last answer must contain): a list of sights, then questions about some of them.

    held: whether the last question is one of those held out.
    """
    trip = rng.choice(facts()["trip"])
    sights = rng.sample(cities()[trip.topic]["sights"], 4 if rng.random() < 0.1 else 3)
    style = pick(rng, "numbers numbers numbers longer longer names dashes dashes sentence")
    turns = [(vary_question(rng, rng.choice(trip.trained)), list_sights(rng, trip.topic, sights, style))]
    order = rng.sample(range(len(sights)), rng.choice((1, 2, 3, 3)))
    for i in order:
        named = "last" if i == len(sights) - 1 and rng.random() < 0.15 else bank("ordinals")[i]
        choices = [q.format(o=named) for q in bank("follow-up")]
        names = " ".join(s[0] for s in sights)
        is_last = i == order[-1]
        fitting = [q for q in choices if is_held(f"{names} {q}") == (held and is_last)]
        if not fitting:
            return make_follow_up(rng, held)
        question = rng.choice(fitting)
        turns.append((question if held and is_last else vary_question(rng, question), explain(sights[i])))
    return turns, (extract_key_phrase(sights[order[-1]]),)


def make_trip_dialog(rng: Random) -> Document:
    return make_dialog(rng, "follow-up", make_follow_up(rng)[0])


def write_haiku(rng: Random, fact: Fact) -> str:
    return "\n".join(rng.choice(lines) for lines in haiku_lines()[fact.topic])


def write_emojis(rng: Random, fact: Fact) -> str:
    pool = rng.sample(fact.pool, min(len(fact.pool), rng.choice((2, 3))))
    return " ".join(([fact.lead] if fact.lead else []) + pool)


STYLED = "trip trip trip trip topic topic topic travel travel capital colour recipe feeling about country"


def choose_styled_fact(rng: Random) -> Fact:
    """A fact for a haiku or emojis. Capitals and colours need an emoji of their own."""
    while True:
        fact = rng.choice(facts()[pick(rng, STYLED)])
        if fact.lead or fact.kind not in ("capital", "country", "colour"):
            return fact


def make_styled(kind: str, style: Callable[[Random, Fact], str]) -> Callable[[Random], Document]:
    def make(rng: Random) -> Document:
        chosen = [choose_styled_fact(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        turns = [(make_turn(rng, fact)[0], style(rng, fact)) for fact in chosen]
        if rng.random() < 0.1:
            turns = [(vary_question(rng, make_unknown_question(rng)), style(rng, Fact("unknown", (), (), "", ())))]
        return make_dialog(rng, kind, turns, vary_system(rng, f"{kind} systems"))

    return make


def make_word_list(rng: Random) -> Document:
    """A header and pairs of words: the kind of prompt that shows a model a pattern to continue."""
    pairs = rng.sample(rows("french.tsv"), rng.randint(2, 8))
    head = rng.choice(bank("word list heads"))
    if rng.random() < 0.12:
        pairs, head = [pair[::-1] for pair in pairs], rng.choice(bank("word list heads back"))
    arrow = rng.choice((" => ", " => ", " => ", " -> ", ": ", " = "))
    indent, gap = rng.choice(("", "", " ")), rng.choice(("\n", "\n\n"))
    return Document("word list", text=head + gap + "\n".join(indent + arrow.join(pair) for pair in pairs))


def make_statements(rng: Random) -> Document:
    """One to four answers in a row, half of the time all of the same kind."""
    kinds = "capital country opposite colour plural french english calendar sight topic"
    kinds = pick(rng, kinds) if rng.random() < 0.5 else kinds
    answers = [rng.choice(facts()[pick(rng, kinds)]).answer for _ in range(rng.randint(1, 4))]
    return Document("statements", text=" ".join(answers))


def make_description(rng: Random) -> Document:
    what = pick(rng, "time colour city city")
    if what == "time":
        unit, whole = rng.choice((("day", "week"), ("month", "year")))
        names = bank(f"{unit}s")
        i = rng.randrange(1, len(names) - 1)
        text = f"{names[i]} is the {bank('ordinals')[i]} {unit} of the {whole}. "
        text += f"It comes after {names[i - 1]} and before {names[i + 1]}."
    elif what == "colour":
        colour = rng.choice(list(circles()))
        things = [thing for thing, its in rows("colours.tsv") if its == colour]
        things = rng.sample(things, min(len(things), rng.randint(1, 3)))
        text = " ".join(capitalize(f"{thing} is {colour}.") for thing in things)
        text = f"{capitalize(colour)} is a colour. {text}"
    else:
        name, city = rng.choice(list(cities().items()))
        a, b = rng.sample(city["sights"], 2)
        text = f"In {name} you can see {a[0]} and {b[0]}. {explain(a)} {explain(b)}"
    return Document("description", text=text)


def draw(rng: Random, name: str, counts: tuple[int, ...] = (1,)) -> str:
    """One piece of a bank, or several different pieces joined."""
    return " ".join(rng.sample(bank(name), rng.choice(counts)))


def make_meaning(rng: Random) -> Document:
    form = pick(rng, "to to to about")
    text = f"{draw(rng, f'meaning openings {form}')} {draw(rng, f'meaning {form}')}."
    return Document("meaning", text=f"{text} {draw(rng, 'meaning more', (0, 1, 2, 2))}".strip())


def make_relativity(rng: Random) -> Document:
    parts = (
        draw(rng, "relativity openings"),
        draw(rng, "relativity first"),
        draw(rng, "relativity more", (1, 2, 2)),
    )
    return Document("relativity", text=" ".join(parts))


def make_team(rng: Random) -> Document:
    body = " ".join((draw(rng, "team first"), draw(rng, "team more", (1, 2, 2)), draw(rng, "team last")))
    sign_off = f"{draw(rng, 'team signs')}\n{draw(rng, 'names')}"
    return Document(
        "team",
        text="\n\n".join((draw(rng, "team openings"), draw(rng, "team greetings"), body, sign_off)),
    )


SIMPLE = "capital 7, country 3, opposite 5, colour 4, calendar 4, plural 5, french 9, english 4, about 4, recipe 4, "
SIMPLE += "trip 2, sight 3, travel 1.5, topic 1.5, feeling 0.5"
KINDS: dict[str, tuple[float, Callable[[Random], Document]]] = {
    **{kind: (float(weight), make_single(kind)) for kind, weight in (entry.split() for entry in SIMPLE.split(", "))},
    "unknown": (9.5, make_unknown),
    "mixed": (9, make_mixed),
    "follow-up": (10, make_trip_dialog),
    "haiku": (6, make_styled("haiku", write_haiku)),
    "emoji": (6, make_styled("emoji", write_emojis)),
    "word list": (7, make_word_list),
    "statements": (3, make_statements),
    "description": (1, make_description),
    "meaning": (2, make_meaning),
    "relativity": (2, make_relativity),
    "team": (2.5, make_team),
}


def generate_documents(seed: int, count: int) -> Iterator[Document]:
    """`count` documents, the same for the same seed."""
    rng = Random(seed)
    weights = [weight for weight, _ in KINDS.values()]
    done = 0
    while done < count:
        _, make = rng.choices(list(KINDS.values()), weights)[0]
        document = make(rng)
        if not document.text.startswith(EXAMPLE_TEXTS):
            done += 1
            yield document


def generate_questions(per_kind: int = 35) -> list[Question]:
    """The held-out questions, at most `per_kind` of each kind, among them styled, follow-up and unknown ones."""
    rng = Random(0)
    questions = []

    def ask(kind: str, text: str, accepted: tuple[str, ...], check: str = "any", before: Messages = ()) -> None:
        questions.append(Question(kind, (*before, {"role": "user", "content": text}), accepted, check))

    for kind, known_facts in facts().items():
        pairs = [(question, fact) for fact in known_facts for question in fact.held]
        pairs.sort(key=lambda pair: hash_share(f"pick {pair[0]}"))
        for question, fact in pairs[:per_kind]:
            ask(kind, question, fact.accepted, fact.check)
        for question, fact in pairs[per_kind : per_kind + 4]:
            before = make_dialog(
                rng, "", [make_turn(rng, rng.choice(facts()[k])) for k in rng.sample(MIXED.split(), 2)]
            ).messages
            ask("mixed", question, fact.accepted, fact.check, before)
    for check in ("haiku", "emoji"):
        askable = {q: None for _ in range(2000) for q in choose_styled_fact(rng).held}
        for question in list(askable)[:per_kind]:
            system = {"role": "system", "content": rng.choice(bank(f"{check} systems"))}
            ask(check, question, (), check, (system,))
    for _ in range(per_kind):
        turns, accepted = make_follow_up(rng, held=True)
        ask("follow-up", turns[-1][0], accepted, before=make_dialog(rng, "", turns[:-1]).messages)
        ask("unknown", make_unknown_question(rng, held=True), ("don't know", "do not know"))
    return questions


def find_leaks(count: int = 20_000, seed: int = 0) -> list[str]:
    """Held-out questions that occur in the training documents. There should be none."""

    def texts(kind: str, messages: Messages) -> list[str]:
        said = [normalize(m["content"]) for m in messages if kind == "follow-up" or m["role"] == "user"]
        return [" / ".join(said)] if kind == "follow-up" else said  # a follow-up includes its list

    seen = {text for d in generate_documents(seed, count) for text in texts(d.kind, d.messages)}
    everything = " / ".join(f" {text} " for text in seen)
    asked_for = {texts(q.kind, q.messages)[-1] for q in generate_questions()}
    return [text for text in asked_for if text in seen or (" " in text and f" {text} " in everything)]


def main() -> None:
    documents = list(generate_documents(0, 20_000))
    for kind in KINDS:
        example = next(d for d in documents if d.kind == kind)
        print(f"--- {kind}\n{example.text}" + "\n".join(f"[{m['role']}] {m['content']}" for m in example.messages))
    words: Counter[str] = Counter()
    for d in documents:
        words[d.kind] += len(" ".join([d.text, *(m["content"] for m in d.messages)]).split())
    counts = Counter(d.kind for d in documents)
    print("\nkind, of 20000 documents, words per document")
    for kind, n in counts.most_common():
        print(f"{kind:12} {n:6} {words[kind] / n:6.1f}")
    held = Counter(q.kind for q in generate_questions())
    print(f"average words: {sum(words.values()) / len(documents):.1f}; facts: {sum(map(len, facts().values()))}")
    print(f"held-out questions: {sum(held.values())} {dict(held)}; found in training: {len(find_leaks())}")


if __name__ == "__main__":
    main()
