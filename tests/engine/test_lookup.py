"""Prompt lookup proposes what followed the most recent occurrence of the last tokens: every short text, by hand."""

from itertools import product

import pytest

from llama.engine.speculative import lookup


def by_hand(tokens: list[int], ngram: int, most: int) -> list[int]:
    tail, found = tokens[-ngram:], []
    for start in range(len(tokens)):
        end = start + ngram
        if end < len(tokens) and tokens[start:end] == tail:
            found = tokens[end : end + most]  # a later one takes an earlier one's place
    return found


@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 3])
def test_every_short_text(ngram: int, most: int) -> None:
    for length in range(ngram, 7):
        for tokens in map(list, product(range(3), repeat=length)):
            assert lookup(tokens, ngram, most) == by_hand(tokens, ngram, most)
