"""What task heads predict for texts: labels of a text, spans in it, answers to questions about it.

Any number of texts: an engine reads them, the longest first, and no text's result depends on the others. Knows
tokenizers, and of a head only that it makes logits of hidden states; knows no batches and no checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor, nn

from .._util.validate import check_count, check_list, check_texts, is_integer
from ..engine.engine import Engine
from ..engine.not_finite import not_finite_error
from ..engine.scoring import check_lengths, read_states
from ..errors import LlamaError, shorten
from ..tokenization.inputs import Text, TextOptions, around_pair, around_text, encode_inputs
from ..tokenization.offsets import Offsets, encode_with_offsets
from ..tokenization.protocol import AnyChatFormat, AnyTokenizer
from .spans import (
    Candidate,
    Span,
    align_labels_to_words,
    collect_tagged_spans,
    find_best_spans,
    merge_candidates,
    split_windows,
    strip_range,
)

if TYPE_CHECKING:
    from .heads import QuestionAnswerer, SequenceClassifier, TokenClassifier

    AnyHead = SequenceClassifier | TokenClassifier | QuestionAnswerer

COMPARED = 20  # answers whose scores sum to one: as many as SQuAD's baselines compare
DOC_STRIDE = 128  # tokens that two windows of a long context share


@dataclass(frozen=True)
class Label:
    """A label of a text."""

    label: str
    score: float  # a probability; in a regression, the number itself


@dataclass(frozen=True)
class Answer:
    """A part of a context that answers a question; "" from 0 to 0 if the context holds no answer."""

    text: str
    start: int  # characters
    end: int  # exclusive
    score: float  # its probability among the answers compared


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments of `answer_all`."""

    doc_stride: int
    max_answer_tokens: int
    n_best: int
    null_threshold: float | None


@dataclass(frozen=True)
class ContextWindow:
    """A part of a text that is read as one row."""

    text: int  # the index of the text
    start: int  # the window's first token of the text
    end: int  # exclusive
    tokens: list[int]  # of the whole row: what comes before the window, the window, and what comes after it
    first: int  # the place of the window's first token in the row


@torch.no_grad()
def classify(
    engine: Engine,
    head: "SequenceClassifier",
    texts: Sequence[Text],
    formatter: AnyChatFormat | None = None,
    **options: Unpack[TextOptions],
) -> list[list[Label]]:
    """The labels of each text, in the order of the texts.

    A text has the tokens that its tokenizer puts around it. Instead of a text there may be a dialog, which `formatter`
    writes, up to its last message. allowed_special: names of control tokens that become tokens in texts.

    The head's problem type decides which: the likeliest label (softmax); all labels with a probability of at least 0.5,
    maybe none, in the order of the head's labels (sigmoid); or every number of a regression.
    Raises LlamaError, before any forward pass, unless `texts` is a list of dialogs, and of texts of at least one
    character, of at most max_seq_len tokens each; and after the passes for logits that aren't finite.
    """
    with engine.together("classify", texts=texts, options=options):
        rows = encode_inputs(engine.tokenizer, formatter, texts, **options)
        check_lengths(rows, engine.model.params.max_seq_len)
    labels = []
    for i, logits in enumerate(compute_logits(engine, head, rows, [len(row) - 1 for row in rows], "classifying")):
        check_finite(engine, head, logits, i)
        labels.append(choose_labels(logits[0], head.config.labels, head.config.infer_problem_type()))
    return labels


@torch.no_grad()
def tag(engine: Engine, head: "TokenClassifier", texts: Sequence[str], *, whole_words: bool = True) -> list[list[Span]]:
    """The spans in each text, in the order of the texts: see `spans.collect_tagged_spans`.

    whole_words: all tokens of a word get the label of its last token, see `spans.align_labels_to_words`. Otherwise
    every token keeps its own.
    A text longer than max_seq_len is read in windows that overlap by half. A token in several windows gets its label
    from the first of them, in which it has the most tokens before it.
    Raises LlamaError, before any forward pass, unless `texts` is a list of texts of at least one character each, or if
    max_seq_len leaves no room for a text; and after the passes for logits that aren't finite.
    """
    with engine.together("tag", texts=texts, options=whole_words):
        check_texts(texts, "text")
        encodings = [encode_with_offsets(engine.tokenizer, text, bos=False) for text in texts]
        around, size = around_text(engine.tokenizer), engine.model.params.max_seq_len
        room = count_room([*around.before, *around.after], size, "what stands around every text")
        windows = [
            make_window(i, start, end, [*around.before], ids, around.after)
            for i, (ids, _) in enumerate(encodings)
            for start, end in split_windows(len(ids), room, room // 2)
        ]
    labels: list[list[int]] = [[] for _ in texts]
    scores: list[list[float]] = [[] for _ in texts]
    rows, firsts = [window.tokens for window in windows], [window.first for window in windows]
    for window, logits in zip(windows, compute_logits(engine, head, rows, firsts, "tagging"), strict=True):
        logits = logits[: window.end - window.start]  # (T, labels)
        check_finite(engine, head, logits, window.text)
        best = logits[len(labels[window.text]) - window.start :].softmax(-1).max(-1)  # of tokens of no earlier window
        labels[window.text] += best.indices.tolist()
        scores[window.text] += best.values.tolist()
    spans = []
    for label_ids, token_scores, (_, offsets), text in zip(labels, scores, encodings, texts, strict=True):
        names = [head.config.labels[i] for i in label_ids]
        if whole_words:
            names, token_scores = align_labels_to_words(names, token_scores, offsets, text)
        spans.append(collect_tagged_spans(names, token_scores, offsets, text))
    return spans


def answer(
    engine: Engine, head: "QuestionAnswerer", question: str, context: str, **options: Unpack[AnswerOptions]
) -> list[Answer]:
    """As `answer_all`, for one question."""
    return answer_all(engine, head, [(question, context)], **options)[0]


@torch.no_grad()
def answer_all(
    engine: Engine,
    head: "QuestionAnswerer",
    pairs: Sequence[tuple[str, str]],
    *,
    doc_stride: int = DOC_STRIDE,
    max_answer_tokens: int = 30,
    n_best: int = 1,
    null_threshold: float | None = None,
) -> list[list[Answer]]:
    """The best answers to each (question, context), at most n_best of them, the best first, in the order of the pairs.

    Question and context are encoded as a pair, as by transformers' tokenizers. A context that is too long is read in
    windows that share doc_stride tokens.
    An answer is a span of the context, of at most max_answer_tokens tokens, whose first and last token aren't only
    white space. Its logit is the start logit of its first token plus the end logit of its last one; of several windows,
    or tokens of the same characters, the largest counts.
    With null_threshold, "no answer" has a logit too: start plus end at position 0, the smallest of all windows (SQuAD
    2's baseline, arXiv:1806.03822). If it exceeds the best answer's by more than null_threshold, "" comes first.
    The score of an answer is its probability among those compared (softmax of the logits): the 20 best answers of all
    windows, or n_best if that is more, and "no answer" if there is a null_threshold.
    Raises LlamaError, before any forward pass, for settings out of their ranges, anything but a list of pairs of texts
    of at least one character, a question that leaves no room within max_seq_len, or a context of white space alone; and
    after the passes for logits that aren't finite.
    """
    options = doc_stride, max_answer_tokens, n_best, null_threshold
    with engine.together("answer_all", pairs=pairs, options=options):
        check_answer_options(*options)
        size = engine.model.params.max_seq_len
        contexts, offsets, windows = encode_pairs(engine.tokenizer, pairs, size, doc_stride)
    compared = max(COMPARED, n_best)
    candidates: list[list[Candidate]] = [[] for _ in pairs]
    null_logits = [math.inf] * len(pairs)
    rows = [window.tokens for window in windows]
    for window, logits in zip(windows, compute_logits(engine, head, rows, [0] * len(rows), "answering"), strict=True):
        check_finite(engine, head, logits, window.text)
        null_logits[window.text] = min(null_logits[window.text], float(logits[0].double().sum()))
        context, characters = contexts[window.text], offsets[window.text][window.start : window.end]
        allowed = torch.tensor([context[start:end].strip() != "" for start, end in characters])
        starts, ends = logits[window.first :][: len(characters)].unbind(-1)  # (T of the window) each
        for span in find_best_spans(starts, ends, allowed, max_answer_tokens, compared):
            start, end = strip_range(context, characters[span.start][0], characters[span.end][1])
            candidates[window.text].append(Candidate(start, end, span.score))
    return [
        rank_answers(merge_candidates(spans, compared), null_logit, context, null_threshold)[:n_best]
        for spans, null_logit, context in zip(candidates, null_logits, contexts, strict=True)
    ]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_answer_options(doc_stride: int, max_answer_tokens: int, n_best: int, null_threshold: float | None) -> None:
    if not is_integer(doc_stride, 0):
        raise LlamaError(f"doc_stride is {shorten(doc_stride)}, expected a whole number of at least 0")
    check_count("max_answer_tokens", max_answer_tokens)
    check_count("n_best", n_best)
    if null_threshold is not None and (not isinstance(null_threshold, Real) or math.isnan(null_threshold)):
        raise LlamaError(
            f"null_threshold is {shorten(null_threshold)}, expected a number, or None for always an answer"
        )


def count_room(tokens: Sequence[int], max_seq_len: int, what: str) -> int:
    """How many tokens of a text fit after these. what: their name in an error."""
    if len(tokens) >= max_seq_len:
        raise LlamaError(
            f"{what} has {len(tokens)} tokens, which leaves no room for a text within max_seq_len {max_seq_len}: "
            "shorten it or build with a larger max_seq_len"
        )
    return max_seq_len - len(tokens)


def check_finite(engine: Engine, head: nn.Module, logits: Tensor, text: int) -> None:
    """Raise LlamaError, naming the text by its index, for logits that aren't finite."""
    if not logits.isfinite().all():
        raise not_finite_error(head, engine.together, f"text {text}: the logits are")


# --- steps ------------------------------------------------------------------------------------------------------------


class LogitsPool:
    """The logits of a row's tokens from one on: `logits` (tokens, outputs), once it was given the states of all."""

    def __init__(self, compute: Callable[[Tensor], Tensor], first: int):
        """compute: what makes logits (..., outputs) of states (..., dim). first: the first token whose logits count."""
        self._compute = compute
        self._first = first
        self._parts: list[Tensor] = []

    def __call__(self, start: int, states: Tensor) -> None:
        if start == 0:  # maybe not for the first time
            self._parts = []
        if start + len(states) > self._first:
            self._parts.append(self._compute(states[max(self._first - start, 0) :]))

    @property
    def logits(self) -> Tensor:
        return torch.cat(self._parts)


def compute_logits(
    engine: Engine, head: "AnyHead", rows: Sequence[list[int]], firsts: Sequence[int], label: str
) -> list[Tensor]:
    """The head's logits of each row's tokens from its first one on, (tokens, outputs) on the CPU.

    label: of the progress bar, which counts tokens.
    """
    pools = [LogitsPool(head.compute_logits, first) for first in firsts]
    logits = [torch.empty(0)] * len(rows)
    for i in read_states(engine, rows, pools, label):
        logits[i] = pools[i].logits.cpu()
    return logits


def choose_labels(logits: Tensor, labels: Sequence[str], problem_type: str) -> list[Label]:
    """The labels of one text from its logits (labels), as `classify` describes."""
    if problem_type == "single_label_classification":
        score, i = logits.softmax(-1).max(-1)
        return [Label(labels[int(i)], float(score))]
    scores = (logits if problem_type == "regression" else logits.sigmoid()).tolist()
    scored = [Label(label, score) for label, score in zip(labels, scores, strict=True)]
    return scored if problem_type == "regression" else [label for label in scored if label.score >= 0.5]


def encode_pairs(
    tokenizer: AnyTokenizer, pairs: Sequence[tuple[str, str]], max_seq_len: int, doc_stride: int
) -> tuple[list[str], list[Offsets], list[ContextWindow]]:
    """(contexts, offsets of each context's tokens, windows of all contexts). Raises as `answer_all` describes."""
    check_list("pairs", pairs)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise LlamaError("pairs has other things than pairs: expected (question, context) each")
    questions, contexts = [question for question, _ in pairs], [context for _, context in pairs]
    check_texts(questions, "question")
    check_texts(contexts, "context")
    around = around_pair(tokenizer)
    context_offsets, windows = [], []
    for i, (question, context) in enumerate(pairs):
        before = [*around.before, *tokenizer.encode(question, bos=False, eos=False), *around.between]
        ids, offsets = encode_with_offsets(tokenizer, context, bos=False)
        if not any(context[start:end].strip() for start, end in offsets):
            raise LlamaError(f"context {i} has no token but white space: expected a text that may hold an answer")
        room = count_room([*before, *around.after], max_seq_len, f"question {i}")
        windows += [
            make_window(i, start, end, before, ids, around.after)
            for start, end in split_windows(len(ids), room, doc_stride)
        ]
        context_offsets.append(offsets)
    return contexts, context_offsets, windows


def make_window(
    text: int, start: int, end: int, before: list[int], ids: list[int], after: Sequence[int]
) -> ContextWindow:
    """The window of the text's `ids` from `start` to `end`, with other tokens around it."""
    return ContextWindow(text, start, end, [*before, *ids[start:end], *after], len(before))


def rank_answers(
    candidates: Sequence[Candidate], null_logit: float, context: str, null_threshold: float | None
) -> list[Answer]:
    """The answers that the candidates, the best first, stand for, with their scores. null_logit: that of no answer."""
    compared = [candidate.score for candidate in candidates] + ([] if null_threshold is None else [null_logit])
    scores = torch.tensor(compared, dtype=torch.float64).softmax(-1).tolist()
    answers = [
        Answer(context[candidate.start : candidate.end], candidate.start, candidate.end, score)
        for candidate, score in zip(candidates, scores, strict=False)
    ]
    if null_threshold is not None and null_logit - candidates[0].score > null_threshold:
        return [Answer("", 0, 0, scores[-1]), *answers]
    return answers
