"""How prompts are divided into forward passes: by properties, and by what the model then computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_checkpoint

from llama import Llama, LlamaError
from llama.engine.pieces import WORTH_A_PASS
from llama.engine.prefill import PrefillPass, plan_passes


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 1000))
def test_every_token_is_in_one_pass(lengths: list[int], chunk: int) -> None:
    lengths = sorted(lengths, reverse=True)
    passes = plan_passes(lengths, chunk)
    assert [step.end for step in passes[:-1]] == [step.start for step in passes[1:]]
    assert (passes[0].start, passes[-1].end) == (0, lengths[0])
    for step in passes:
        assert step.rows == sum(length > step.start for length in lengths) > 0
        assert step.rows * (step.end - step.start) <= max(chunk, step.rows)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_padding_is_less_than_it_costs_to_avoid_it(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    computed = sum(step.rows * (step.end - step.start) for step in plan_passes(lengths, 10**9))
    assert computed - sum(lengths) < WORTH_A_PASS * len(lengths)


def test_what_is_known() -> None:
    three = [PrefillPass(0, 16, 3), PrefillPass(16, 128, 2), PrefillPass(128, 512, 1)]
    assert plan_passes([512, 128, 16], 10**9) == three
    assert plan_passes([500, 499, 498], 10**9) == [PrefillPass(0, 500, 3)]
    assert plan_passes([5], 2) == [PrefillPass(0, 2, 1), PrefillPass(2, 4, 1), PrefillPass(4, 5, 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_chunks_change_nothing_but_the_memory(checkpoint: Path) -> None:
    """Tokens and logprobs of ragged prompts are the same for any chunk, and no pass is larger than its chunk."""
    prompts = [[5] * 70, list(range(3)), list(range(100, 141)), [9]]
    options = {"max_seq_len": 96, "device": "cpu", "dtype": "float32"}
    whole = Llama.build(checkpoint, **options)
    expected = whole.generate(prompts, 10, temperature=0, logprobs=True, echo=True)
    for chunk in (1, 7, 64):
        llama = Llama.build(checkpoint, **options, prefill_chunk=chunk)
        sizes = []
        hidden_states = llama.model.hidden_states

        def watch(tokens: torch.Tensor, *rest: object, run=hidden_states, sizes=sizes) -> torch.Tensor:
            sizes.append(tokens.numel())
            return run(tokens, *rest)

        llama.model.hidden_states = watch
        actual = llama.generate(prompts, 10, temperature=0, logprobs=True, echo=True)
        assert actual[0] == expected[0]
        for mine, theirs in zip(actual[1], expected[1], strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-4)
        assert max(sizes) <= max(chunk, len(prompts))


def test_a_chunk_of_nothing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(LlamaError, match="prefill_chunk is 0, expected a whole number of at least 1"):
        Llama.build(checkpoint, device="cpu", prefill_chunk=0)
