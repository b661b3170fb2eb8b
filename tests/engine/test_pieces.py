"""How texts are divided into forward passes: by properties, and by what the model then computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_checkpoint

from llama import Llama, LlamaError
from llama.engine.pieces import WORTH_A_PASS, choose_pieces


def read_all(lengths: list[int], chunk: int) -> list[tuple[int, int]]:
    """The (rows, width) of the passes that read texts of these lengths to their ends."""
    passes, left = [], list(lengths)
    while left:
        count, width = choose_pieces(left, chunk)
        passes.append((count, width))
        left = [length - width if i < count else length for i, length in enumerate(left)]
        left = [length for length in left if length > 0]
    return passes


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 1000))
def test_no_pass_is_larger_than_its_chunk(lengths: list[int], chunk: int) -> None:
    passes = read_all(lengths, chunk)
    assert all(0 < count * width <= chunk and count <= len(lengths) for count, width in passes)
    assert sum(count * width for count, width in passes) >= sum(lengths)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_padding_is_less_than_it_costs_to_avoid_it(lengths: list[int]) -> None:
    computed = sum(count * width for count, width in read_all(lengths, 10**9))
    assert computed - sum(lengths) < WORTH_A_PASS * len(lengths)


def test_what_is_known() -> None:
    assert read_all([512, 128, 16], 10**9) == [(3, 16), (2, 112), (1, 384)]
    assert read_all([500, 499, 498], 10**9) == [(3, 500)]
    assert read_all([5], 2) == [(1, 2), (1, 2), (1, 1)]


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
