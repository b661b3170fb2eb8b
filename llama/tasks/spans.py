"""From numbers for each token to spans: the best answers, windows of a long text, runs of tags.

Pure functions. Knows no model and no tokenizer.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor

from ..errors import LlamaError

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # as Unicode names their letters


@dataclass(frozen=True)
class Candidate:
    """A span that may be the answer: of tokens, `end` its last one; or of characters, `end` the first after it."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of a text, what they are, and how sure that is."""

    text: str
    start: int
    end: int
    label: str
    score: float


def best_spans(
    start_logits: Tensor, end_logits: Tensor, allowed: Tensor, max_answer_tokens: int, n: int
) -> list[Candidate]:
    """The n best spans of at most `max_answer_tokens` tokens that begin and end at allowed ones, the best first.

    start_logits, end_logits: (T). allowed: bool (T). A span's score is the sum of the two logits, in float64; of equal
    ones the earlier comes first, then the shorter. Fewer than n where there are fewer. Takes memory of T x
    max_answer_tokens.
    """
    width = min(max_answer_tokens, len(allowed))
    if width == 0:
        return []
    starts = start_logits.double().masked_fill(~allowed, -math.inf)  # (T)
    ends = F.pad(end_logits.double().masked_fill(~allowed, -math.inf), (0, width - 1), value=-math.inf)
    scores = (starts[:, None] + ends.unfold(0, width, 1)).flatten()  # (T, width) -> (T * width): in the order of ties
    least = scores.topk(min(n, len(scores))).values[-1]
    found = ((scores >= least) & (scores > -math.inf)).nonzero().flatten()
    found = found[scores[found].sort(descending=True, stable=True).indices[:n]]
    places = zip(found.tolist(), scores[found].tolist(), strict=True)
    return [Candidate(i // width, i // width + i % width, score) for i, score in places]


def merged(candidates: Iterable[Candidate], n: int) -> list[Candidate]:
    """The n best, the best first, ties as in `best_spans`; one that is there several times counts once, at its best."""
    best: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        place = candidate.start, candidate.end
        if place not in best or best[place].score < candidate.score:
            best[place] = candidate
    return sorted(best.values(), key=lambda candidate: (-candidate.score, candidate.start, candidate.end))[:n]


def windows(context_len: int, room: int, doc_stride: int) -> Iterator[tuple[int, int]]:
    """Windows (start, end) of at most `room` tokens, which together hold all of `context_len`, in their order.

    doc_stride: how many tokens a window has in common with the one before, as transformers' tokenizers mean `stride`.
    Raises LlamaError if the context needs several windows and no window would get further than the one before.
    """
    if context_len > room and not 0 <= doc_stride < room:
        raise LlamaError(
            f"windows of {room} tokens can't overlap by doc_stride {doc_stride}: choose a doc_stride below {room}, or "
            "make room by a larger max_seq_len"
        )
    start = end = 0
    while end < context_len:
        end = min(start + room, context_len)
        yield start, end
        start = end - doc_stride


def tagged_spans(
    labels: Sequence[str], scores: Sequence[float], offsets: Sequence[tuple[int, int]], text: str
) -> list[Span]:
    """The spans that tokens' labels make, in their order, without white space at their ends.

    labels: "O" for none; "B-X" begins a span of X; "I-X" continues one, or begins one after anything else; a plain "X"
    is as "I-X" (arXiv:cmp-lg/9505040). scores: of each token; a span has their mean. offsets: of each token, the
    characters it stands for; who stands for none is passed over.
    Spans have no character in common: it is the earlier's, where two tokens are parts of one character.
    """
    runs: list[tuple[str, int, int, list[float]]] = []
    before = None
    for label, score, (start, end) in zip(labels, scores, offsets, strict=True):
        if start == end:
            continue
        kind = None if label == "O" else label[2:] if label[:2] in ("B-", "I-") else label
        if kind is not None and kind == before and not label.startswith("B-"):
            _, start, _, known = runs.pop()
            known.append(score)
            runs.append((kind, start, end, known))
        elif kind is not None:
            runs.append((kind, start, end, [score]))
        before = kind
    spans: list[Span] = []
    for kind, start, end, known in runs:
        start, end = stripped(text, max(start, spans[-1].end if spans else 0), end)
        if start < end:
            spans.append(Span(text[start:end], start, end, kind, math.fsum(known) / len(known)))
    return spans


def of_whole_words(
    labels: Sequence[str], scores: Sequence[float], offsets: Sequence[tuple[int, int]], text: str
) -> tuple[list[str], list[float]]:
    """Labels and scores such that all tokens of a word agree: with its last one, as no other has read all of it.

    Arguments as `tagged_spans` takes them. A word begins a span of that kind where its first token does.
    """
    words = word_numbers(text)
    agreed, sure = [*labels], [*scores]
    there = [i for i, (start, end) in enumerate(offsets) if start < end]
    for _, group in groupby(there, key=lambda i: words[offsets[i][1] - 1]):
        own = list(group)
        last = labels[own[-1]]
        within = f"I-{last[2:]}" if last[:2] in ("B-", "I-") else last
        for i in own:
            agreed[i], sure[i] = within, scores[own[-1]]
        if labels[own[0]][:2] == "B-" and labels[own[0]][2:] == last[2:]:
            agreed[own[0]] = labels[own[0]]
    return agreed, sure


def word_numbers(text: str) -> list[int]:
    """For each character, the number of its word: of letters, digits and marks side by side. All else stands alone, as
    does each letter of scripts that put no spaces between words."""
    numbers: list[int] = []
    number, joined = -1, False
    for c in text:
        kind = unicodedata.category(c)[0]
        inside = kind in "LN" and not unicodedata.name(c, "").startswith(UNSPACED)
        goes_on = kind == "M" or (inside and joined)  # marks belong to what they stand on
        number += not goes_on or number < 0
        joined = inside or (kind == "M" and joined)
        numbers.append(number)
    return numbers


def stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters `start` to `end` without the white space at both ends; empty if there is nothing else."""
    kept = text[start:end].lstrip()
    start = max(start, end - len(kept))
    return start, start + len(kept.rstrip())
