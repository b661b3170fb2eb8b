"""What task heads make of texts: labels of a text, spans in it, answers to questions about it.

Any number of texts: the longest go first, as many at a time as asked for; no text's result depends on the others.
Knows tokenizers, and of a head only that it gives logits; knows no checkpoints.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import parallel
from .._util.validate import check_count, check_list, check_texts, is_integer
from ..engine.scoring import batch_by_length, check_lengths, encode_texts, not_finite_error
from ..errors import LlamaError
from ..tokenization.offsets import Offsets, encode_with_offsets
from ..tokenization.protocol import AnyTokenizer
from .spans import Candidate, Span, best_spans, merged, of_whole_words, stripped, tagged_spans, windows

if TYPE_CHECKING:
    from .heads import QuestionAnswerer, SequenceClassifier, TokenClassifier

COMPARED = 20  # answers whose scores sum to one: as many as SQuAD's baselines look at


@dataclass(frozen=True)
class Label:
    """score: a probability; of a regression, the number itself."""

    label: str
    score: float


@dataclass(frozen=True)
class Answer:
    """Characters `start` to `end` (exclusive) of a context; "" from 0 to 0 says that it holds no answer."""

    text: str
    start: int
    end: int
    score: float


class AnswerOptions(TypedDict, total=False):
    """What `answer_all` takes by name."""

    doc_stride: int
    max_answer_tokens: int
    n_best: int
    null_threshold: float | None


@dataclass(frozen=True)
class ContextWindow:
    """Tokens `start` to `end` of a text, and all that is read with them."""

    text: int
    start: int
    end: int
    tokens: list[int]


@torch.no_grad()
def classify(
    head: "SequenceClassifier", tokenizer: AnyTokenizer, texts: Sequence[str], max_seq_len: int, max_batch_size: int
) -> list[list[Label]]:
    """The labels of each text, in the order of the texts.

    By the head's problem type a text has one label, the likeliest (softmax); those of probability
    0.5 and more, maybe none, in the order of the head's labels (sigmoid); or each number of a regression.
    Raises LlamaError, before any forward pass, for what isn't a list of texts of at least one character and at most
    max_seq_len tokens each; after a pass for logits that aren't finite.
    """
    with parallel.raise_together(parallel.group()):
        check_sizes(max_seq_len, max_batch_size)
        rows = encode_texts(tokenizer, texts)
        check_lengths(rows, max_seq_len)
    found: list[list[Label]] = [[] for _ in rows]
    for batch, output in passes(head, rows, max_batch_size, "classifying"):
        for i, logits in zip(batch, output.logits.cpu(), strict=True):
            found[i] = labels_of(finite(logits, i, head), head.config.labels, head.config.infer_problem_type())
    return found


@torch.no_grad()
def tag(
    head: "TokenClassifier",
    tokenizer: AnyTokenizer,
    texts: Sequence[str],
    max_seq_len: int,
    max_batch_size: int,
    *,
    whole_words: bool = True,
) -> list[list[Span]]:
    """The spans that the head finds in each text, in the order of the texts; `spans.tagged_spans` says which.

    whole_words: all tokens of a word have the label of its last one, which alone has read all of it; see
    `spans.of_whole_words`. Otherwise each has its own.
    A text longer than max_seq_len is read in windows that overlap by half; a token's label comes from the first window
    that has it, where most stands before it.
    Raises LlamaError, before any forward pass, for what isn't a list of texts of at least one character each, or a
    max_seq_len without room for any; after a pass for logits that aren't finite.
    """
    with parallel.raise_together(parallel.group()):
        check_sizes(max_seq_len, max_batch_size)
        check_texts(texts, "text")
        read = [encode_with_offsets(tokenizer, text, bos=False) for text in texts]
        prefix = tokenizer.encode("", bos=True, eos=False)
        room = room_after(prefix, max_seq_len, "what stands before every text")
        places = [
            ContextWindow(i, start, end, prefix + ids[start:end])
            for i, (ids, _) in enumerate(read)
            for start, end in windows(len(ids), room, room // 2)
        ]
    labels = [[0] * len(ids) for ids, _ in read]
    scores = [[0.0] * len(ids) for ids, _ in read]
    tagged: list[tuple[ContextWindow, Tensor]] = []
    for batch, output in passes(head, [place.tokens for place in places], max_batch_size, "tagging"):
        for i, logits in zip(batch, output.logits.cpu(), strict=True):
            own = logits[len(prefix) : len(places[i].tokens)]  # (T, labels)
            tagged.append((places[i], finite(own, places[i].text, head).softmax(-1)))
    for place, chances in sorted(tagged, key=lambda one: -one[0].start):  # the first window has the last word
        best = chances.max(-1)
        labels[place.text][place.start : place.end] = best.indices.tolist()
        scores[place.text][place.start : place.end] = best.values.tolist()
    found = []
    for known, sure, (_, offsets), text in zip(labels, scores, read, texts, strict=True):
        named = [head.config.labels[i] for i in known]
        if whole_words:
            named, sure = of_whole_words(named, sure, offsets, text)
        found.append(tagged_spans(named, sure, offsets, text))
    return found


def answer(
    head: "QuestionAnswerer",
    tokenizer: AnyTokenizer,
    question: str,
    context: str,
    max_seq_len: int,
    max_batch_size: int,
    **options: Unpack[AnswerOptions],
) -> list[Answer]:
    """What `answer_all` finds for one question."""
    (found,) = answer_all(head, tokenizer, [(question, context)], max_seq_len, max_batch_size, **options)
    return found


@torch.no_grad()
def answer_all(
    head: "QuestionAnswerer",
    tokenizer: AnyTokenizer,
    pairs: Sequence[tuple[str, str]],
    max_seq_len: int,
    max_batch_size: int,
    *,
    doc_stride: int = 128,
    max_answer_tokens: int = 30,
    n_best: int = 1,
    null_threshold: float | None = None,
) -> list[list[Answer]]:
    """The best answers to each (question, context), at most n_best of them, the best first, in the order of the pairs.

    Question and context are read as transformers' tokenizers encode a pair, a context that is too long in windows that
    have doc_stride tokens in common. An answer is a span of the context, of at most
    max_answer_tokens tokens, the first and the last of which aren't white space alone; its logit is that of its first
    token as a start plus that of its last as an end, the greatest where several windows or tokens of the same
    characters give it several. With null_threshold, the logit of no answer is the sum of both at position 0, the least
    of all windows (SQuAD 2's baseline, arXiv:1806.03822); if it is more than null_threshold above the best answer's,
    "" comes first. An answer's score is its probability among those compared (softmax of the logits): the 20 best
    answers of all windows, or n_best where that is more, and no answer where there is a null_threshold.
    Raises LlamaError, before any forward pass, for settings out of their ranges, what isn't a list of pairs of texts of
    at least one character each, a question that leaves no room within max_seq_len, or a context of nothing but white
    space; after a pass for logits that aren't finite.
    """
    with parallel.raise_together(parallel.group()):
        check_sizes(max_seq_len, max_batch_size)
        check_answers(doc_stride, max_answer_tokens, n_best, null_threshold)
        contexts, offsets, places = laid_out(tokenizer, pairs, max_seq_len, doc_stride)
    compared = max(COMPARED, n_best)
    candidates: list[list[Candidate]] = [[] for _ in pairs]
    nulls = [math.inf] * len(pairs)
    for batch, output in passes(head, [place.tokens for place in places], max_batch_size, "answering"):
        for i, logits in zip(batch, torch.stack([output.start_logits, output.end_logits], 1).cpu(), strict=True):
            place, length = places[i], len(places[i].tokens)
            logits = finite(logits[:, :length], place.text, head)  # (2, T): starts and ends
            nulls[place.text] = min(nulls[place.text], float(logits[:, 0].double().sum()))
            first, context = length - (place.end - place.start), contexts[place.text]
            characters = offsets[place.text][place.start : place.end]
            allowed = torch.tensor([context[start:end].strip() != "" for start, end in characters])
            for one in best_spans(logits[0, first:], logits[1, first:], allowed, max_answer_tokens, compared):
                start, end = stripped(context, characters[one.start][0], characters[one.end][1])
                candidates[place.text].append(Candidate(start, end, one.score))
    return [
        ranked(merged(found, compared), null, context, null_threshold)[:n_best]
        for found, null, context in zip(candidates, nulls, contexts, strict=True)
    ]


# --- what is checked ------------------------------------------------------------------------------------------------


def check_sizes(max_seq_len: int, max_batch_size: int) -> None:
    check_count("max_seq_len", max_seq_len)
    check_count("max_batch_size", max_batch_size)


def check_answers(doc_stride: int, max_answer_tokens: int, n_best: int, null_threshold: float | None) -> None:
    if not is_integer(doc_stride, 0):
        raise LlamaError(f"doc_stride is {doc_stride!r}, expected a whole number of at least 0")
    check_count("max_answer_tokens", max_answer_tokens)
    check_count("n_best", n_best)
    if null_threshold is not None and (not isinstance(null_threshold, Real) or math.isnan(null_threshold)):
        raise LlamaError(f"null_threshold is {null_threshold!r}, expected a number, or None for always an answer")


def room_after(tokens: Sequence[int], max_seq_len: int, what: str) -> int:
    """How many tokens of a text fit after these."""
    if len(tokens) >= max_seq_len:
        raise LlamaError(
            f"{what} has {len(tokens)} tokens, which leaves no room for a text within max_seq_len {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
    return max_seq_len - len(tokens)


def finite(logits: Tensor, text: int, head: nn.Module) -> Tensor:
    if not logits.isfinite().all():
        raise not_finite_error(text, "logits", next(head.parameters()).dtype)
    return logits


# --- how it is done -------------------------------------------------------------------------------------------------


def passes(
    head: nn.Module, rows: Sequence[Sequence[int]], max_batch_size: int, doing: str
) -> Iterator[tuple[list[int], Any]]:
    """What the head gives for rows of tokens, a batch at a time, with the rows' numbers."""
    device = next(head.parameters()).device
    for batch in batch_by_length(range(len(rows)), lambda i: len(rows[i]), max_batch_size, doing):
        tokens = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)  # (B, T)
        lengths = torch.tensor([len(rows[i]) for i in batch])  # (B)
        yield batch, head(tokens.to(device), lengths.to(device))


def labels_of(logits: Tensor, labels: Sequence[str], problem_type: str) -> list[Label]:
    """Of one text's logits (num_labels), as `classify` says."""
    if problem_type == "single_label_classification":
        score, i = logits.softmax(-1).max(-1)
        return [Label(labels[int(i)], float(score))]
    scores = (logits if problem_type == "regression" else logits.sigmoid()).tolist()
    found = [Label(label, score) for label, score in zip(labels, scores, strict=True)]
    return found if problem_type == "regression" else [one for one in found if one.score >= 0.5]


def laid_out(
    tokenizer: AnyTokenizer, pairs: Sequence[tuple[str, str]], max_seq_len: int, doc_stride: int
) -> tuple[list[str], list[Offsets], list[ContextWindow]]:
    """The contexts, where their tokens stand, and all windows that are to be read. Raises as `answer_all` says."""
    check_list("pairs", pairs)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise LlamaError("pairs has other things than pairs: expected (question, context) each")
    questions, contexts = [question for question, _ in pairs], [context for _, context in pairs]
    check_texts(questions, "question")
    check_texts(contexts, "context")
    prefix = tokenizer.encode("", bos=True, eos=False)
    known, places = [], []
    for i, (question, context) in enumerate(pairs):
        asked = tokenizer.encode(question, bos=True, eos=False) + prefix
        ids, offsets = encode_with_offsets(tokenizer, context, bos=False)
        if not any(context[start:end].strip() for start, end in offsets):
            raise LlamaError(f"context {i} has no token but white space: expected a text that may hold an answer")
        room = room_after(asked, max_seq_len, f"question {i}")
        places += [
            ContextWindow(i, start, end, asked + ids[start:end]) for start, end in windows(len(ids), room, doc_stride)
        ]
        known.append(offsets)
    return contexts, known, places


def ranked(found: Sequence[Candidate], null: float, context: str, null_threshold: float | None) -> list[Answer]:
    """Answers with their scores; `found` is the best first."""
    compared = [one.score for one in found] + ([] if null_threshold is None else [null])
    scores = torch.tensor(compared, dtype=torch.float64).softmax(-1).tolist()
    answers = [
        Answer(context[one.start : one.end], one.start, one.end, score)
        for one, score in zip(found, scores, strict=False)
    ]
    if null_threshold is not None and null - found[0].score > null_threshold:
        return [Answer("", 0, 0, scores[-1]), *answers]
    return answers
