"""How much of which texts a pass reads, so that little is padding and the pass is small.

Knows lengths alone.
"""

from bisect import insort
from collections.abc import Sequence

WORTH_A_PASS = 32  # tokens of padding that cost as much as one more pass, which reads the weights once more


def choose_pieces(lengths: Sequence[int], chunk: int) -> tuple[int, int]:
    """Of texts with so many tokens left to read: how many of the first ones a pass takes, and at most how many of each.

    The pass has at most `chunk` tokens, padding included.
    """
    count, width = 1, min(lengths[0], chunk)
    shortest = min(lengths)
    first: list[int] = []
    for rows, length in enumerate(lengths, 1):
        if rows * shortest > chunk:
            break
        insort(first, length)
        if rows > 1 and rows * (end := choose_end(first)) <= chunk:
            count, width = rows, end
    return count, width


def choose_end(lengths: Sequence[int]) -> int:
    """Where a pass over texts of these lengths, the shortest first, should end.

    It is the first length at which padding the finished ones further would cost more than another pass without them.
    """
    for finished, length in enumerate(lengths[:-1], 1):
        if finished * (lengths[finished] - length) >= WORTH_A_PASS:
            return length
    return lengths[-1]
