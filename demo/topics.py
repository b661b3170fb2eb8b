"""Sentences and their topics, to train a classifier on.

Many sentences also name things of another topic, or begin or end with a remark about one. The label is the topic of the
statement itself. Knows nothing of files.
"""

from random import Random

from demo.facts import capitalize, sections
from demo.templates import Part, fill_slots, select, words

TOPICS = ("cooking", "travel", "animals", "weather", "sport", "money", "health", "music")


def make_topic_record(rng: Random, part: Part) -> dict[str, str]:
    """{"text", "label"}, the label one of TOPICS."""
    sheet = dict(sections("topic_sentences.txt"))
    label = rng.choice(TOPICS)
    pieces = fill_slots(rng, rng.choice(select(sheet[label], part.new_templates)), words(part.new_words))
    text = "".join(piece.text for piece in pieces)
    where = rng.random()
    if where < 0.3:
        text = f"{rng.choice(sheet['before'][0].split(' / '))} {text}"
    elif where < 0.6:
        text = f"{text[:-1]} {rng.choice(sheet['after'][0].split(' / '))}{text[-1]}"
    return {"text": capitalize(text), "label": label}
