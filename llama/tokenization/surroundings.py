"""What a tokenizer puts around a text that it encodes as a whole: begin-of-text, end-of-text, separators of a pair.

Knows ids; knows no model.
"""

from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True)
class Surroundings:
    """The tokens around a text, or around two."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()  # of a pair
    after: tuple[int, ...] = ()


def find_surroundings(encoding: tokenizers.Encoding) -> Surroundings | None:
    """What is around the texts in the library's encoding of one or two; None if the second stands before the first."""
    texts = encoding.sequence_ids  # of each token, the number of its text; None of a token that belongs to none
    first = [i for i, text in enumerate(texts) if text == 0]
    second = [i for i, text in enumerate(texts) if text == 1]
    if not first:
        return Surroundings()
    if second and second[0] < first[-1]:
        return None
    last = (second or first)[-1]
    between = encoding.ids[first[-1] + 1 : second[0]] if second else []
    return Surroundings(tuple(encoding.ids[: first[0]]), tuple(between), tuple(encoding.ids[last + 1 :]))
