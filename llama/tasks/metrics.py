"""Metrics of predictions against expected values: numbers by name, from 0 to 1 except for the perplexity.

Knows no model. torchmetrics is imported only in the functions that need it.
"""

import math
from collections.abc import Collection, Sequence, Sized
from typing import Any

import torch

from .._util.packages import missing_error
from ..errors import LlamaError

Labels = str | Collection[str]


def classification_metrics(predicted: Sequence[Labels], expected: Sequence[Labels]) -> dict[str, float]:
    """How often the labels of texts are right.

    "accuracy": the share of texts with exactly the expected labels. "f1_micro": the F1 of all labels together.
    "f1_macro": the mean F1 of all labels that were predicted or expected anywhere. A text has one label, or several.
    Raises LlamaError unless there are as many predictions as expected values, at least one.
    """
    check_pairs(predicted, expected)
    guesses, truths = ([{text} if isinstance(text, str) else set(text) for text in x] for x in (predicted, expected))
    result = {"accuracy": sum(a == b for a, b in zip(guesses, truths, strict=True)) / len(truths)}
    labels = sorted(set().union(*guesses, *truths))
    if not labels:  # no text has a label, as was expected
        return result | {"f1_micro": 1.0, "f1_macro": 1.0}
    try:
        from torchmetrics.functional.classification import multilabel_f1_score
    except ImportError:
        raise missing_error("measuring", "torchmetrics") from None
    predicted_rows, expected_rows = (
        torch.tensor([[int(label in text) for label in labels] for text in texts]) for texts in (guesses, truths)
    )  # (texts, labels) each
    micro = multilabel_f1_score(predicted_rows, expected_rows, len(labels), average="micro", validate_args=False)
    macro = multilabel_f1_score(predicted_rows, expected_rows, len(labels), average="macro", validate_args=False)
    return result | {"f1_micro": float(micro), "f1_macro": float(macro)}


def answer_metrics(predicted: Sequence[str], expected: Sequence[Collection[str]]) -> dict[str, float]:
    """SQuAD's "exact_match" and "f1" of words (arXiv:1606.05250), each against the best of a question's right answers.

    expected: the right answers to each question; none, or "", if it has no answer. Raises LlamaError unless there are
    as many predictions as expected values, at least one.
    """
    check_pairs(predicted, expected)
    try:
        from torchmetrics.functional.text import squad
    except ImportError:
        raise missing_error("measuring", "torchmetrics") from None
    guesses: list[dict[str, str]] = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)]
    truths: list[dict[str, Any]] = [
        {"id": str(i), "answers": {"text": list(texts) or [""], "answer_start": [0] * max(len(texts), 1)}}
        for i, texts in enumerate(expected)
    ]
    return {name: float(value) / 100 for name, value in squad(guesses, truths).items()}


def span_metrics(
    predicted: Sequence[Collection[tuple[int, int, str]]], expected: Sequence[Collection[tuple[int, int, str]]]
) -> dict[str, float]:
    """How many of the spans (start, end, label) are right: equal in all three to an expected span of the same text.

    "precision", "recall" and "f1" over all texts together; 1.0 if there are no spans. Raises LlamaError unless there
    are as many predictions as expected values, at least one.
    """
    check_pairs(predicted, expected)
    right = sum(len(set(a) & set(b)) for a, b in zip(predicted, expected, strict=True))
    guessed, true = (sum(len(set(spans)) for spans in texts) for texts in (predicted, expected))
    counts = {"precision": guessed, "recall": true, "f1": (guessed + true) / 2}
    return {name: right / count if count else 1.0 for name, count in counts.items()}


def measure_perplexity(loss: float) -> dict[str, float]:
    """ "perplexity": exp of a mean cross-entropy, bounded so that it stays finite."""
    return {"perplexity": math.exp(min(loss, 700))}


def check_pairs(predicted: Sized, expected: Sized) -> None:
    if not len(predicted) == len(expected) > 0:
        raise LlamaError(f"{len(predicted)} were predicted and {len(expected)} expected: give as many, at least one")
