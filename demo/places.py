"""Sentences with their places and languages marked, to train a tagger on.

Some words mislead: people are named like cities, and French is a language but French bread isn't. Knows nothing of
files.
"""

from random import Random

from demo.facts import capitalize, make_up_word, sections
from demo.templates import Part, Piece, fill_slots, select, words

LABELS = {"city": "PLACE", "country": "PLACE", "language": "LANGUAGE"}  # by slot; other slots have no label
# The endings of made-up words by slot.
ENDINGS = {"city": "", "country": "ia", "language": "ish", "nation": "ish", "name": "", "namesake": ""}
MADE_UP = 1 / 4  # the probability that a slot gets made-up words


def choose_words(rng: Random, new: bool) -> dict[str, list[str]]:
    """Words by slot. In training a quarter of them are made up, so that the sentence has to tell what they are."""
    real = words(new)
    choices = real | {"nation": real["language"], "name": real["woman"] + real["man"]}
    for slot, ending in ENDINGS.items():
        if not new and rng.random() < MADE_UP:
            choices[slot] = [make_up_word(rng).capitalize() + ending for _ in range(8)]
    return choices


def make_place_record(rng: Random, part: Part) -> dict:
    """{"text", "spans": [{"start", "end", "label"}]}: half-open ranges of characters, in order, labels as in LABELS.

    A span doesn't include the article of a country's name.
    """
    sheet = dict(sections("place_sentences.txt"))
    some = {head: rng.choice(sheet[head][0].split(" / ")) for head in ("someone", "tail", "before", "after")}
    kind = rng.choices(("none", "place", "language", "several"), (20, 25, 20, 35))[0]
    template = rng.choice(select(sheet[kind], part.new_templates))
    template = template.replace("{someone}", some["someone"]).replace("{tail}", some["tail"])
    pieces = fill_slots(rng, template, choose_words(rng, part.new_words))
    pieces[0] = pieces[0]._replace(text=capitalize(pieces[0].text))
    if rng.random() < 0.25:
        pieces = [Piece(f"{some['before']} "), *pieces]
    if rng.random() < 0.25:
        pieces = [*pieces, Piece(f" {some['after']}")]
    text, spans = "", []
    for piece in pieces:
        text += piece.text
        if piece.slot in LABELS:
            name = piece.text.removeprefix("the ").removeprefix("The ")
            spans.append({"start": len(text) - len(name), "end": len(text), "label": LABELS[piece.slot]})
    return {"text": text, "spans": spans}
