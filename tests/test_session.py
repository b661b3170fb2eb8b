"""A conversation that stays in the KV cache: the tokens of fresh runs, and only what is new is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ARGS, write_checkpoint

from llama import Llama, LlamaError
from llama.rotary import RopeScaling
from llama.session import Session

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 2, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama.build(write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS, endless=True), **OPTIONS)


@pytest.fixture
def prefilled(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass that isn't a decoding step."""
    seen, hidden_states = [], llama.model.hidden_states

    def counting(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.extend([tokens.shape[1]] if tokens.shape[1] > 1 else [])
        return hidden_states(tokens, *rest)

    monkeypatch.setattr(llama.model, "hidden_states", counting)
    return seen


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(0, 255), min_size=1, max_size=9), st.integers(1, 6)),
        min_size=1,
        max_size=6,
    )
)
def test_turns_are_as_fresh_ones(llama: Llama, turns: list[tuple[int, list[int], int]]) -> None:
    """Each turn keeps a beginning of the conversation and adds to it."""
    session, talk = Session(llama), []
    for kept, new, length in turns:
        talk = [*talk[:kept], *new]
        tokens = [step.token for step in session.stream(talk, length, temperature=0)]
        assert session.reused + session.prefilled == len(talk)
        expected, _ = llama.generate([talk], length, temperature=0)
        assert tokens == expected[0]
        list(session.stream(talk, length, temperature=0))
        talk = [*talk, *tokens]


def test_only_what_is_new_is_prefilled(llama: Llama, prefilled: list[int]) -> None:
    session, first = Session(llama), [1, 2, 3, 4, 5, 6, 7]
    answer = [step.token for step in session.stream(first, 5, temperature=0)]
    second = [*first, *answer, 9, 9, 9]
    list(session.stream(second, 5, temperature=0))
    assert (session.reused, session.prefilled) == (len(first) + 4, 4)  # the last token of an answer was never input
    list(session.stream([*first[:4], 8, 8], 5, temperature=0))
    assert (session.reused, session.prefilled) == (4, 2)
    assert prefilled == [7, 4, 2]
    list(session.stream([*first[:4], 8, 8], 5, temperature=0))
    assert session.prefilled == 1, "the last token goes through again, for its logits"


def test_sessions_go_on_beside_each_other(llama: Llama) -> None:
    """A turn of one, or a call of something else, leaves the others what they have."""
    session, other = Session(llama), Session(llama)
    list(session.stream([1, 2, 3, 4, 5], 2, temperature=0))
    list(other.stream([9, 2, 3, 4, 5], 2, temperature=0))
    assert other.reused == 0
    llama.generate([[9, 9, 9]], 5)
    llama.score(["a text", "another"])
    for one, first in ((session, 1), (other, 9)):
        list(one.stream([first, 2, 3, 4, 5, 6], 2, temperature=0))
        assert one.reused == 5
    third = Session(llama)
    list(third.stream([9, 2, 3, 4, 5, 7], 2, temperature=0))
    assert third.reused == 5, "sessions share what they have in common"


def test_an_answer_that_was_broken_off_is_kept(llama: Llama) -> None:
    session = Session(llama)
    stream = session.stream([1, 2, 3], 9, temperature=0)
    heard = [next(stream).token for _ in range(4)]
    stream.close()
    list(session.stream([1, 2, 3, *heard, 7], 2, temperature=0))
    assert session.reused == 6


def test_after_an_error_the_next_turn_is_right(llama: Llama) -> None:
    session = Session(llama)
    list(session.stream([21, 22, 23], 2, temperature=0))

    def spoil(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise LlamaError("spoilt")

    with pytest.raises(LlamaError, match="spoilt"):
        list(session.stream([21, 22, 23, 24, 25, 26], 2, logits_processor=spoil))
    expected = llama.generate([[21, 22, 23, 24, 25, 26]], 2, temperature=0)[0][0]
    assert [step.token for step in session.stream([21, 22, 23, 24, 25, 26], 2, temperature=0)] == expected


def test_angles_that_depend_on_the_length_are_made_anew(tmp_path: Path) -> None:
    from dataclasses import replace

    scaling = RopeScaling("dynamic", 4.0, original_max_position_embeddings=8)
    directory = write_checkpoint(tmp_path, ARGS, endless=True)
    llama = Llama.build(directory, **OPTIONS)
    llama.model.params = replace(llama.model.params, rope_scaling=scaling)
    session = Session(llama)
    list(session.stream([1, 2, 3], 8, temperature=0))
    list(session.stream([1, 2, 3, 4], 2, temperature=0))
    assert session.reused == 0
