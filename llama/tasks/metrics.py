"""How good answers are: numbers from what was predicted and what was expected, by name, from 0 to 1.

Knows no model. torchmetrics, which most of them come from, is needed only by who asks for them.
"""

from collections.abc import Collection, Sequence, Sized
from typing import Any

import torch

from ..errors import LlamaError

Labels = str | Collection[str]


def classification_metrics(predicted: Sequence[Labels], expected: Sequence[Labels]) -> dict[str, float]:
    """How often the labels of texts are right.

    "accuracy": the share of texts with exactly the expected labels; "f1_micro": over all labels at once; "f1_macro":
    the mean of every label's that was predicted or expected anywhere. A text has one label, or a collection of them.
    Raises LlamaError for no texts, or not as many of both.
    """
    check_pairs(predicted, expected)
    found, right = ([{one} if isinstance(one, str) else set(one) for one in many] for many in (predicted, expected))
    result = {"accuracy": sum(a == b for a, b in zip(found, right, strict=True)) / len(right)}
    labels = sorted(set().union(*found, *right))
    if not labels:  # no text has one, as was expected
        return result | {"f1_micro": 1.0, "f1_macro": 1.0}
    try:
        from torchmetrics.functional.classification import multilabel_f1_score
    except ImportError:
        raise not_installed() from None
    given, wanted = (torch.tensor([[int(label in one) for label in labels] for one in many]) for many in (found, right))
    micro = multilabel_f1_score(given, wanted, len(labels), average="micro", validate_args=False)
    macro = multilabel_f1_score(given, wanted, len(labels), average="macro", validate_args=False)
    return result | {"f1_micro": float(micro), "f1_macro": float(macro)}


def answer_metrics(predicted: Sequence[str], expected: Sequence[Collection[str]]) -> dict[str, float]:
    """SQuAD's "exact_match" and "f1" of words (arXiv:1606.05250), each with the best of a question's right answers.

    expected: the right answers to each question; none, or "", where it has no answer. Raises LlamaError for no
    questions, or not as many of both.
    """
    check_pairs(predicted, expected)
    try:
        from torchmetrics.functional.text import squad
    except ImportError:
        raise not_installed() from None
    found: list[dict[str, str]] = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)]
    right: list[dict[str, Any]] = [
        {"id": str(i), "answers": {"text": list(texts) or [""], "answer_start": [0] * max(len(texts), 1)}}
        for i, texts in enumerate(expected)
    ]
    return {name: float(value) / 100 for name, value in squad(found, right).items()}


def span_metrics(
    predicted: Sequence[Collection[tuple[int, int, str]]], expected: Sequence[Collection[tuple[int, int, str]]]
) -> dict[str, float]:
    """How many of the spans (start, end, label) are right: equal in all three to one of the same text.

    "precision", "recall" and "f1" over all texts at once; 1.0 where no span is there to be wrong. Raises LlamaError for
    no texts, or not as many of both.
    """
    check_pairs(predicted, expected)
    right = sum(len(set(a) & set(b)) for a, b in zip(predicted, expected, strict=True))
    found, wanted = (sum(len(set(spans)) for spans in many) for many in (predicted, expected))
    counts = {"precision": found, "recall": wanted, "f1": (found + wanted) / 2}
    return {name: right / count if count else 1.0 for name, count in counts.items()}


def check_pairs(predicted: Sized, expected: Sized) -> None:
    if not len(predicted) == len(expected) > 0:
        raise LlamaError(f"{len(predicted)} were predicted and {len(expected)} expected: give as many, at least one")


def not_installed() -> LlamaError:
    return LlamaError("torchmetrics isn't installed: pip install llama[finetune]")
