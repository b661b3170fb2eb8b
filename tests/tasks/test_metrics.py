"""Metrics against their definitions, written out slowly."""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vocabulary import some

from llama.errors import LlamaError
from llama.tasks.metrics import answer_metrics, classification_metrics, span_metrics

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics isn't installed")
names = st.sampled_from("abcd")
pairs = st.lists(st.tuples(names, names), min_size=1, max_size=12)
sets = st.sets(names)


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-6)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def f1(right: int, predicted: int, expected: int) -> float:
    precision, recall = share(right, predicted), share(right, expected)
    return share(2 * precision * recall, precision + recall)


def by_label(predicted: list[set[str]], expected: list[set[str]]) -> dict[str, float]:
    counts = []
    for label in set().union(*predicted, *expected):
        guesses, wanted = [label in one for one in predicted], [label in one for one in expected]
        counts.append((sum(a and b for a, b in zip(guesses, wanted, strict=True)), sum(guesses), sum(wanted)))
    return {
        "accuracy": sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(expected),
        "f1_micro": f1(*(sum(column) for column in zip(*counts, strict=True))) if counts else 1.0,
        "f1_macro": sum(f1(*count) for count in counts) / len(counts) if counts else 1.0,
    }


@needs_torchmetrics
@some
@given(cases=pairs)
@example(cases=[("a", "a")])
def test_one_label_a_text(cases: list[tuple[str, str]]) -> None:
    predicted, expected = map(list, zip(*cases, strict=True))
    result = classification_metrics(predicted, expected)
    assert result == close(by_label([{one} for one in predicted], [{one} for one in expected]))
    assert result["f1_micro"] == pytest.approx(result["accuracy"])
    assert classification_metrics([[one] for one in predicted], [{one} for one in expected]) == result


@needs_torchmetrics
@some
@given(cases=st.lists(st.tuples(sets, sets), min_size=1, max_size=8))
@example(cases=[(set(), set())])
def test_several_labels_a_text(cases: list[tuple[set[str], set[str]]]) -> None:
    predicted, expected = map(list, zip(*cases, strict=True))
    assert classification_metrics(predicted, expected) == close(by_label(predicted, expected))


@needs_torchmetrics
def test_names_of_several_letters() -> None:
    result = classification_metrics(["yes", "no", "no"], ["yes", "no", "yes"])
    assert result == close({"accuracy": 2 / 3, "f1_micro": 2 / 3, "f1_macro": 2 / 3})


# Answers


def normal(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def words(predicted: str, expected: str) -> float:
    guesses, truths = normal(predicted), normal(expected)
    if not guesses or not truths:
        return float(guesses == truths)
    return f1(sum((Counter(guesses) & Counter(truths)).values()), len(guesses), len(truths))


answers = st.lists(
    st.sampled_from(["the", "The", "a", "cat", "Cat.", "sat,", "on", "it's", "42", "é", "-"]), max_size=5
).map(" ".join)


@needs_torchmetrics
@some
@given(cases=st.lists(st.tuples(answers, st.lists(answers, max_size=3)), min_size=1, max_size=5))
@example(cases=[("", []), ("", [""]), ("cat", []), ("", ["cat"])])
@example(cases=[("The cat.", ["a dog", "Cat"]), ("on the mat", ["mat"])])
def test_answers(cases: list[tuple[str, list[str]]]) -> None:
    right = [texts or [""] for _, texts in cases]
    exact = [max(normal(text) == normal(one) for one in texts) for (text, _), texts in zip(cases, right, strict=True)]
    shared = [max(words(text, one) for one in texts) for (text, _), texts in zip(cases, right, strict=True)]
    expected = {"exact_match": sum(exact) / len(cases), "f1": sum(shared) / len(cases)}
    assert answer_metrics([text for text, _ in cases], [texts for _, texts in cases]) == close(expected)


# Spans

spans = st.sets(st.tuples(st.integers(0, 2), st.integers(3, 4), st.sampled_from("XY")), max_size=4)


@some
@given(cases=st.lists(st.tuples(spans, spans), min_size=1, max_size=4))
def test_spans(cases: list[tuple[set[tuple[int, int, str]], set[tuple[int, int, str]]]]) -> None:
    predicted = {(i, *span) for i, (one, _) in enumerate(cases) for span in one}
    expected = {(i, *span) for i, (_, one) in enumerate(cases) for span in one}
    right = len(predicted & expected)
    result = span_metrics([list(one) for one, _ in cases], [one for _, one in cases])
    assert result["precision"] == (right / len(predicted) if predicted else 1.0)
    assert result["recall"] == (right / len(expected) if expected else 1.0)
    nothing = not predicted and not expected
    assert result["f1"] == pytest.approx(1.0 if nothing else f1(right, len(predicted), len(expected)))


def test_spans_of_an_example() -> None:
    predicted = [[(0, 3, "X"), (4, 6, "Y")], [(0, 3, "X")]]
    expected = [[(0, 3, "X"), (4, 6, "X")], []]
    assert span_metrics(predicted, expected) == close({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5})


# What is refused


@pytest.mark.parametrize("metrics", [classification_metrics, answer_metrics, span_metrics])
def test_numbers_of_texts(metrics: Callable[..., Any]) -> None:
    for predicted, expected in ((["a"], []), ([], []), (["a"], ["a", "b"])):
        with pytest.raises(LlamaError, match=f"{len(predicted)} were predicted and {len(expected)} expected"):
            metrics(predicted, expected)


@pytest.mark.parametrize("metrics", [classification_metrics, answer_metrics])
def test_what_is_not_installed(metrics: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("classification", "text"):
        monkeypatch.setitem(sys.modules, f"torchmetrics.functional.{name}", None)
    with pytest.raises(LlamaError, match=r"^measuring needs torchmetrics, .*: run .* -m pip install torchmetrics$"):
        metrics(["a"], [["a"]])
