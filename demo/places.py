"""Sentences with the places and languages in them marked: what a tagger is trained on.

People have names of cities, and French is a language but French bread is not. Knows nothing of files.
"""

from random import Random

from demo.facts import made_up_word, sections, sentence
from demo.templates import Part, Piece, allowed, fill, words

LABELS = {"city": "PLACE", "country": "PLACE", "language": "LANGUAGE"}  # of slots; all others have none
# Of made-up words, by slot.
ENDINGS = {"city": "", "country": "ia", "language": "ish", "nation": "ish", "name": "", "namesake": ""}
MADE_UP = 1 / 4


def choices(rng: Random, new: bool) -> dict[str, list[str]]:
    """Words for the slots. A quarter of those that training sees are made up: the rest tells what they are."""
    known = words(new)
    found = known | {"nation": known["language"], "name": known["woman"] + known["man"]}
    for slot, ending in ENDINGS.items():
        if not new and rng.random() < MADE_UP:
            found[slot] = [made_up_word(rng).capitalize() + ending for _ in range(8)]
    return found


def tagged(rng: Random, part: Part) -> dict:
    """{"text", "spans": [{"start", "end", "label"}]}: half-open ranges of characters, in order, labels as in LABELS.

    An article is no part of a country's name.
    """
    sheet = dict(sections("place_sentences.txt"))
    some = {head: rng.choice(sheet[head][0].split(" / ")) for head in ("someone", "tail", "before", "after")}
    kind = rng.choices(("none", "place", "language", "several"), (20, 25, 20, 35))[0]
    template = rng.choice(allowed(sheet[kind], part.new_templates))
    template = template.replace("{someone}", some["someone"]).replace("{tail}", some["tail"])
    pieces = fill(rng, template, choices(rng, part.new_words))
    pieces[0] = pieces[0]._replace(text=sentence(pieces[0].text))
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
