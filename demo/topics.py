"""Sentences and their topics: what a classifier is trained on.

Many sentences name things of another topic too, and many begin or end with an aside about one: it is what the sentence
says that has the topic. Knows nothing of files.
"""

from random import Random

from demo.facts import sections, sentence
from demo.templates import Part, allowed, fill, words

TOPICS = ("cooking", "travel", "animals", "weather", "sport", "money", "health", "music")


def topic(rng: Random, part: Part) -> dict[str, str]:
    """{"text", "label"}, the label one of TOPICS."""
    sheet = dict(sections("topic_sentences.txt"))
    label = rng.choice(TOPICS)
    pieces = fill(rng, rng.choice(allowed(sheet[label], part.new_templates)), words(part.new_words))
    text = "".join(piece.text for piece in pieces)
    where = rng.random()
    if where < 0.3:
        text = f"{rng.choice(sheet['before'][0].split(' / '))} {text}"
    elif where < 0.6:
        text = f"{text[:-1]} {rng.choice(sheet['after'][0].split(' / '))}{text[-1]}"
    return {"text": sentence(text), "label": label}
