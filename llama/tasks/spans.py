"""Spans from the scores of single tokens: the best answers, windows over a long text, runs of tags.

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

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # how Unicode's names of letters begin


@dataclass(frozen=True)
class Candidate:
    """A span that may be the answer, in tokens or in characters."""

    start: int
    end: int  # in tokens, the last one of the span; in characters, the first one after it
    score: float


@dataclass(frozen=True)
class Span:
    """A labelled part of a text."""

    text: str
    start: int  # characters
    end: int  # exclusive
    label: str
    score: float  # the mean probability of the label over the span's tokens


def find_best_spans(
    start_logits: Tensor, end_logits: Tensor, allowed: Tensor, max_answer_tokens: int, n: int
) -> list[Candidate]:
    """The n best spans of at most `max_answer_tokens` tokens that begin and end at allowed tokens, the best first.

    start_logits, end_logits: (T). allowed: bool (T). A span's score is the sum of the two logits, in float64; of equal
    scores the earlier span comes first, then the shorter. Returns fewer spans if there are fewer. Takes memory of
    T x max_answer_tokens.
    """
    width = min(max_answer_tokens, len(allowed))
    if width == 0:
        return []
    starts = start_logits.double().masked_fill(~allowed, -math.inf)  # (T)
    ends = F.pad(end_logits.double().masked_fill(~allowed, -math.inf), (0, width - 1), value=-math.inf)
    scores = (starts[:, None] + ends.unfold(0, width, 1)).flatten()  # (T, width) -> (T * width): in the order of ties
    least = scores.topk(min(n, len(scores))).values[-1]
    best = ((scores >= least) & (scores > -math.inf)).nonzero().flatten()
    best = best[scores[best].sort(descending=True, stable=True).indices[:n]]
    pairs = zip(best.tolist(), scores[best].tolist(), strict=True)
    return [Candidate(i // width, i // width + i % width, score) for i, score in pairs]


def merge_candidates(candidates: Iterable[Candidate], n: int) -> list[Candidate]:
    """The n best, the best first, ties as in `find_best_spans`. Equal spans count once, with their best score."""
    best: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        place = candidate.start, candidate.end
        if place not in best or best[place].score < candidate.score:
            best[place] = candidate
    return sorted(best.values(), key=lambda candidate: (-candidate.score, candidate.start, candidate.end))[:n]


def split_windows(context_len: int, room: int, doc_stride: int) -> Iterator[tuple[int, int]]:
    """Windows (start, end) of at most `room` tokens, in order, which together cover `context_len` tokens.

    doc_stride: how many tokens a window shares with the one before, as `stride` of transformers' tokenizers.
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


def collect_tagged_spans(
    labels: Sequence[str], scores: Sequence[float], offsets: Sequence[tuple[int, int]], text: str
) -> list[Span]:
    """The spans that the labels of a text's tokens describe, in order, without white space at their ends.

    labels: of each token. "O" is in no span; "B-X" begins a span of X; "I-X" continues a span of X, or begins one after
    anything else; a plain "X" means "I-X" (arXiv:cmp-lg/9505040). scores: of each token; a span has their mean.
    offsets: the characters that each token stands for; a token of no characters is skipped.
    Spans don't overlap: a character that two tokens share belongs to the earlier span.
    """
    runs: list[tuple[str, int, int, list[float]]] = []  # kind, first character, end, scores of the tokens
    before = None
    for label, score, (start, end) in zip(labels, scores, offsets, strict=True):
        if start == end:
            continue
        kind = None if label == "O" else label[2:] if label[:2] in ("B-", "I-") else label
        if kind is not None and kind == before and not label.startswith("B-"):
            _, start, _, run_scores = runs.pop()
            run_scores.append(score)
            runs.append((kind, start, end, run_scores))
        elif kind is not None:
            runs.append((kind, start, end, [score]))
        before = kind
    spans: list[Span] = []
    for kind, start, end, run_scores in runs:
        start, end = strip_range(text, max(start, spans[-1].end if spans else 0), end)
        if start < end:
            spans.append(Span(text[start:end], start, end, kind, math.fsum(run_scores) / len(run_scores)))
    return spans


def align_labels_to_words(
    labels: Sequence[str], scores: Sequence[float], offsets: Sequence[tuple[int, int]], text: str
) -> tuple[list[str], list[float]]:
    """Labels and scores that are the same for all tokens of a word: those of its last token.

    Only the last token has seen the whole word, since attention is causal. Arguments as in `collect_tagged_spans`. A
    word begins a span if its first token begins one of the same kind.
    """
    words = number_words(text)
    word_labels, word_scores = [*labels], [*scores]
    visible = [i for i, (start, end) in enumerate(offsets) if start < end]
    for _, group in groupby(visible, key=lambda i: words[offsets[i][1] - 1]):
        tokens = list(group)
        last = labels[tokens[-1]]
        inside = f"I-{last[2:]}" if last[:2] in ("B-", "I-") else last
        for i in tokens:
            word_labels[i], word_scores[i] = inside, scores[tokens[-1]]
        if labels[tokens[0]][:2] == "B-" and labels[tokens[0]][2:] == last[2:]:
            word_labels[tokens[0]] = labels[tokens[0]]
    return word_labels, word_scores


def number_words(text: str) -> list[int]:
    """The number of the word that each character belongs to.

    A word is a run of letters, digits and marks. Every other character is a word by itself, and so is each letter of a
    script that puts no spaces between words.
    """
    numbers: list[int] = []
    number, in_word = -1, False
    for c in text:
        category = unicodedata.category(c)[0]
        joins = category in "LN" and not unicodedata.name(c, "").startswith(UNSPACED)
        continues = category == "M" or (joins and in_word)  # a mark belongs to the character before it
        number += not continues or number < 0
        in_word = joins or (category == "M" and in_word)
        numbers.append(number)
    return numbers


def strip_range(text: str, start: int, end: int) -> tuple[int, int]:
    """The range `start` to `end` of a text without white space at its ends; empty if there is only white space."""
    kept = text[start:end].lstrip()
    start = max(start, end - len(kept))
    return start, start + len(kept.rstrip())
