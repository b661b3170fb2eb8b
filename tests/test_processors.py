"""Functions that change logits before a token is drawn, against those of transformers, and by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama import LlamaError
from llama.sampling import (
    Context,
    add_bias,
    apply_logits_processors,
    forbid,
    forbid_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    narrow,
    penalize_frequency,
    penalize_presence,
    penalize_repetition,
    sample,
)
from llama.settings import Settings, settings_of_rows

VOCABULARY = 23
few = settings(deadline=None, max_examples=60)
tokens_of_text = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)


def row(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def theirs(name: str, *arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    def process(logits: Tensor, tokens: list[int]) -> Tensor:
        return getattr(transformers, name)(*arguments)(torch.tensor([tokens]), logits[None].clone())[0]

    return process


@few
@given(tokens=tokens_of_text, penalty=st.floats(0.3, 3), seed=st.integers(0, 99))
def test_repetition_penalty(tokens: list[int], penalty: float, seed: int) -> None:
    expected = theirs("RepetitionPenaltyLogitsProcessor", penalty)(row(seed), tokens)
    assert torch.equal(penalize_repetition(row(seed), penalty, Context(tokens)), expected)


@few
@given(tokens=tokens_of_text, size=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_repeat_ngrams(tokens: list[int], size: int, seed: int) -> None:
    few_words = [token % 4 for token in tokens]  # so that some repeat
    expected = theirs("NoRepeatNGramLogitsProcessor", size)(row(seed), few_words)
    assert torch.equal(forbid_repeated_ngrams(row(seed), size, Context(few_words)), expected)


@few
@given(bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), min_size=1), seed=st.integers(0, 99))
def test_logit_bias(bias: dict[int, float], seed: int) -> None:
    expected = theirs("SequenceBiasLogitsProcessor", {(token,): value for token, value in bias.items()})(row(seed), [0])
    assert torch.allclose(add_bias(row(seed), bias, Context([0])), expected)


def test_min_gen_len() -> None:
    process = theirs("MinNewTokensLengthLogitsProcessor", 3, 4, [5, 9])
    for made in range(6):
        expected = process(row(1), [1] * (3 + made))
        logits = apply_logits_processors(row(1), Settings(min_gen_len=4), Context([1] * 3, [1] * made, {5, 9}))
        assert torch.equal(logits, expected)


@few
@given(tokens=st.lists(st.integers(0, VOCABULARY - 1), max_size=30), a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_penalties_of_the_answer(tokens: list[int], a: float, b: float) -> None:
    context = Context([], tokens)
    logits = penalize_frequency(penalize_presence(row(0), a, context), b, context)
    for token, logit in enumerate(row(0).tolist()):
        count = tokens.count(token)
        assert logits[token].item() == pytest.approx(logit - b * count - a * (count > 0), abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 23, 50])
def test_top_k(k: int) -> None:
    for seed in range(20):
        assert torch.equal(keep_top_k(row(seed), k), theirs("TopKLogitsWarper", k)(row(seed), [0]))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p(p: float) -> None:
    for seed in range(20):
        assert torch.equal(keep_top_p(row(seed), p), theirs("TopPLogitsWarper", p)(row(seed), [0]))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p(p: float) -> None:
    for seed in range(20):
        assert torch.equal(keep_min_p(row(seed), p), theirs("MinPLogitsWarper", p)(row(seed), [0]))


@few
@given(
    temperature=st.floats(0.05, 4),
    k=st.one_of(st.none(), st.integers(1, 30)),
    p=st.floats(0.05, 1),
    least=st.floats(0, 0.5),
    penalty=st.floats(0.5, 2),
    tokens=tokens_of_text,
    seed=st.integers(0, 99),
)
def test_all_together_in_their_order(
    temperature: float, k: int | None, p: float, least: float, penalty: float, tokens: list[int], seed: int
) -> None:
    bias = {3: 2.0, 4: -1.0}
    given = Settings(
        temperature=temperature, top_k=k, top_p=p, min_p=least, repetition_penalty=penalty, no_repeat_ngram_size=2,
        logit_bias=bias, logits_processor=lambda _, logits: logits * 1.5,
    )  # fmt: skip
    expected = theirs("SequenceBiasLogitsProcessor", {(token,): value for token, value in bias.items()})(
        row(seed), tokens
    )
    expected = theirs("RepetitionPenaltyLogitsProcessor", penalty)(expected, tokens)
    expected = 1.5 * theirs("NoRepeatNGramLogitsProcessor", 2)(expected, tokens)
    expected = theirs("TemperatureLogitsWarper", temperature)(expected, tokens)
    expected = expected if k is None else theirs("TopKLogitsWarper", k)(expected, tokens)
    expected = expected if p == 1 else theirs("TopPLogitsWarper", p)(expected, tokens)
    expected = theirs("MinPLogitsWarper", least)(expected, tokens)
    logits = narrow(apply_logits_processors(row(seed), given, Context(tokens[:1], tokens[1:])), given.narrowing)
    assert torch.allclose(torch.softmax(logits, -1), torch.softmax(expected, -1), atol=1e-5)


@pytest.mark.parametrize(
    "given", [Settings(top_k=4, top_p=0.8), Settings(top_p=0.7, min_p=0.2), Settings(min_p=0.1, top_k=9)]
)
def test_what_is_drawn_is_what_is_left(given: Settings) -> None:
    """Over evenly spread uniform numbers, each token is drawn as often as its probability says."""
    logits, steps = row(5), 20_000
    uniform = (torch.arange(steps) / steps)[:, None]
    drawn = torch.bincount(sample(logits.expand(steps, -1), given, uniform), minlength=VOCABULARY) / steps
    assert torch.allclose(drawn, torch.softmax(narrow(logits, given.narrowing), -1), atol=2 / steps)


def test_what_is_given_is_left_alone() -> None:
    logits = row(1)
    before = logits.clone()
    every = Settings({1: 1.0}, 1.5, 1.0, 1.0, 2, 3, None, 0.5, 3, 0.5, 0.1)
    narrow(apply_logits_processors(logits, every, Context([1, 2], [1, 2], {3})), every.narrowing)
    forbid(logits, [1])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", ["a string", torch.zeros(3), torch.zeros(VOCABULARY, dtype=torch.long)])
def test_what_a_processor_returns_is_looked_at(bad: Any) -> None:
    with pytest.raises(LlamaError, match=r"logits_processor returned .*, expected a float tensor of shape"):
        apply_logits_processors(row(1), Settings(logits_processor=lambda *_: bad), Context([1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected a number of at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0, expected a number in (0, 1]"),
        ({"top_k": 0}, "top_k is 0, expected a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 1.5}, "min_p is 1.5, expected a number in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3, expected a number in [-2, 2]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": [1]}, "logit_bias is [1], expected numbers by token id"),
        ({"logit_bias": {"a": 1}}, "logit_bias is {'a': 1}"),
        ({"min_gen_len": -1}, "min_gen_len is -1, expected a whole number of at least 0"),
        ({"min_gen_len": 9, "max_gen_len": 3}, "min_gen_len is 9 and max_gen_len 3: lower the one or raise the other"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size is True"),
        ({"logits_processor": 3}, "logits_processor is 3, expected a function of tokens and logits"),
        ({"stop": ["a", ""]}, "stop is ['a', ''], expected a text or a list of texts, none of them empty"),
        ({"stop_token_ids": "abc"}, "stop_token_ids is 'abc', expected a list of token ids"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"max_gen_len": 0}, "max_gen_len is 0"),
        ({"heat": 3}, "'heat' is no setting: known are frequency_penalty, logit_bias"),
    ],
)
def test_what_cannot_be_is_refused(given: dict, message: str) -> None:
    with pytest.raises(LlamaError) as error:
        settings_of_rows(1, given, None)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert ("num_beams" in str(error.value)) == ("heat" in given)  # what the calls take beside settings is named too
    with pytest.raises(LlamaError) as error:
        settings_of_rows(2, {}, [None, given])
    assert str(error.value).startswith("rows[1]: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([{}], "rows has 1 entries, expected a list of 2"), ("ab", "rows has a str"), ([{}, 3], r"rows\[1\] is a int")],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        settings_of_rows(2, {}, rows)


def test_a_rows_own_settings_come_before_those_of_all() -> None:
    first, second = settings_of_rows(2, {"top_p": 0.5, "stop": "x"}, [{"top_p": 0.7}, None])
    assert (first.top_p, second.top_p, first.stop, second.stop) == (0.7, 0.5, ("x",), ("x",))
