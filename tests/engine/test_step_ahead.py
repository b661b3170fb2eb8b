"""Steps that start before the last tokens are read, as on a GPU: the stream is the same, whatever stops when."""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PROMPTS, write_checkpoint

from llama import Llama, LlamaError
from llama.generation import Step


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Llama]:
    """Two Llamas of one checkpoint: as on a CPU, and one that runs ahead."""
    directory = write_checkpoint(tmp_path_factory.mktemp("ahead"), endless=True)
    waiting, ahead = (
        Llama.build(directory, max_seq_len=96, max_batch_size=4, device="cpu", dtype="float32") for _ in range(2)
    )
    ahead.engine.stepper.runs_ahead = True
    assert not waiting.engine.stepper.runs_ahead
    return waiting, ahead


def steps_of(llama: Llama, stop_tokens: set[int], *arguments: Any) -> list[list[Step]]:
    llama.tokenizer.stop_tokens = stop_tokens
    return list(llama.stream(*arguments))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=96), min_size=1, max_size=4),
    max_gen_len=st.one_of(st.none(), st.integers(1, 30)),
    temperature=st.sampled_from([0, 0.6, 3.0]),
    stops=st.sampled_from([0, 2, 20, 128, 256]),
    logprobs=st.booleans(),
    echo=st.booleans(),
)
def test_the_stream_is_the_same(
    pair: tuple[Llama, Llama],
    prompts: list[list[int]],
    max_gen_len: int | None,
    temperature: float,
    stops: int,
    logprobs: bool,
    echo: bool,
) -> None:
    """Tokens, texts, logprobs and order are the same for sequences that end at any time, by a stop or by length."""
    arguments = (prompts, max_gen_len, temperature, 0.9, logprobs, echo)
    expected, actual = (steps_of(llama, set(range(stops)), *arguments) for llama in pair)
    assert [len(steps) for steps in actual] == [len(steps) for steps in expected]
    for mine, theirs in zip(chain(*actual), chain(*expected), strict=True):
        assert replace(mine, logprob=None) == replace(theirs, logprob=None)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def shapes_of(llama: Llama, monkeypatch: pytest.MonkeyPatch, stops: set[int], *arguments: Any) -> list[tuple[int, int]]:
    shapes = []
    forward = llama.model.hidden_states

    def watch(tokens: torch.Tensor, *where: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *where)

    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "hidden_states", watch)
        steps_of(llama, stops, *arguments)
    return shapes


def test_no_step_is_wasted_on_a_length(pair: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1] * 90, [2] * 20, [3] * 93]  # 6, 76 and 3 tokens fit
    expected, actual = (shapes_of(llama, monkeypatch, set(), prompts, None, 0) for llama in pair)
    assert sorted(actual) == sorted(expected)


def test_one_step_is_wasted_on_a_stop(pair: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = pair[0].generate([[5, 6, 7]], 9, temperature=0)
    stop = text[0][4]
    before = text[0].index(stop)
    waiting, ahead = (shapes_of(llama, monkeypatch, {stop}, [[5, 6, 7]], 20, 0) for llama in pair)
    assert waiting == [(1, 3)] + [(1, 1)] * before
    assert ahead == [(1, 3)] + [(1, 1)] * (before + 1)


def test_the_next_step_has_begun_when_tokens_are_yielded(
    pair: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    for llama, begun in zip(pair, (0, 1), strict=True):
        calls = []
        forward = llama.model.hidden_states
        llama.tokenizer.stop_tokens = set()
        with monkeypatch.context() as patch:
            patch.setattr(llama.model, "hidden_states", lambda *a, f=forward, c=calls: (c.append(1), f(*a))[1])
            next(llama.stream([[5, 6, 7]], 20, 0))
        assert len(calls) == 1 + begun


def test_a_newer_call_leaves_an_open_stream(pair: tuple[Llama, Llama]) -> None:
    waiting, ahead = pair
    waiting.tokenizer.stop_tokens = ahead.tokenizer.stop_tokens = set()
    asked = [[[1] * 80, [2] * 60], [[9, 8, 7], [4]]]
    expected = [waiting.generate(prompts, 6, temperature=0)[0] for prompts in asked]
    streams = [ahead.stream(prompts, 6, temperature=0) for prompts in asked]
    found: list[list[list[int]]] = [[[], []], [[], []]]
    for turn in range(20):
        for step in next(streams[turn % 2], []):
            found[turn % 2][step.row].append(step.token)
    assert found == expected


def test_logits_that_are_not_finite_are_named(pair: tuple[Llama, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = pair[1]
    forward = ahead.model.logits
    monkeypatch.setattr(ahead.model, "logits", lambda h: forward(h) * (torch.nan if len(h) == 3 else 1))
    with pytest.raises(LlamaError, match=r"row \d: the logits at position \d+ are not finite in torch.float32"):
        ahead.text_completion(PROMPTS[:3], temperature=0.5)
