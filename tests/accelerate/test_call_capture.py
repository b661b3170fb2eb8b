"""Decoding steps of the CPU, recorded and replayed, whatever happens to the model: as its layers by themselves.

test_ranks.py compares ranks, which meet within such a step; test_graphs.py has what doesn't depend on who records.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARGS, write_checkpoint
from torch import Tensor

from llama import Llama
from llama.accelerate.call_capture import capture_calls
from llama.accelerate.kernels import cpu

ALL_AT_ONCE = replace(
    ARGS,
    n_heads=4,
    n_kv_heads=2,
    qkv_bias=True,
    wo_bias=True,
    mlp_bias=True,
    qk_norm=True,
    sliding_window=40,
    sliding_layers=(1,),
)
BATCHES = [[[5, 6, 7]], [[1] * 30, [9], [3, 4]], [[8] * 3] * 5, [[7] * 120, [5], [2] * 126, [4]], [[1]] * 3]
OPTIONS = {"max_seq_len": 200, "max_batch_size": 11, "device": "cpu"}

compiled = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), ALL_AT_ONCE, endless=True)


@pytest.fixture
def llama(checkpoint: Path) -> Llama:
    return Llama.build(checkpoint, **OPTIONS, dtype="float32")


def unrecorded(llama: Llama) -> Llama:
    """The same layers, run as they are written."""
    model = copy.deepcopy(llama.model)
    model.refresh()
    model.fast._make_steps = lambda: None
    model.fast.steps = None  # steps run as they are written
    return Llama(model, llama.tokenizer)


def step(llama: Llama, tokens: Tensor, position: int) -> Tensor:
    return llama.model(tokens[:, position : position + 1], position)


@compiled
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int4"}], ids=str)
def test_texts_are_the_same(checkpoint: Path, options: dict[str, str]) -> None:
    """To the last bit: of ragged batches, which shrink."""
    llama = Llama.build(checkpoint, **OPTIONS, **options)
    plain = unrecorded(llama)
    for prompts in (*BATCHES, *BATCHES, [[3, 1]] * 11, [[3, 1]] * 9):
        found = llama.generate(prompts, 40, temperature=0, logprobs=True)
        assert found == plain.generate(prompts, 40, temperature=0, logprobs=True)
    assert {size for size, *_ in llama.model.fast.steps.captured.captures} == {1, 2, 4, 8, 11}


@compiled
def test_nothing_of_the_layers_runs_in_a_replay(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(6).view(1, 6)
    step(llama, tokens, 0)
    expected = step(unrecorded(llama), tokens, 0)
    monkeypatch.setattr("llama.accelerate.layers.FastNorm.__call__", None)
    assert torch.equal(step(llama, tokens, 0), expected)


@compiled
def test_hooks_are_called_in_each_step(llama: Llama) -> None:
    """And what they return is taken."""
    tokens, seen = torch.arange(8).view(2, 4), []
    plain = unrecorded(llama)
    step(llama, tokens, 0)
    step(plain, tokens, 0)
    hook = llama.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output) or 2 * output)
    other = plain.model.layers[1].register_forward_hook(lambda _, __, output: 2 * output)
    for position in (1, 2):
        assert torch.equal(step(llama, tokens, position), step(plain, tokens, position))
    assert len(seen) == 2
    hook.remove(), other.remove()
    assert torch.equal(step(llama, tokens, 3), step(plain, tokens, 3))
    assert len(seen) == 2


@compiled
def test_a_part_that_was_changed_is_seen(llama: Llama) -> None:
    tokens = torch.arange(20).view(2, 10)
    plain, before = unrecorded(llama), [step(llama, tokens, 0)]
    step(plain, tokens, 0)

    def change(model: torch.nn.Module, kind: int) -> None:
        layer = model.layers[1]
        if kind == 0:  # the matrix of one layer
            state = layer.feed_forward.w2.state_dict()
            layer.feed_forward.w2.load_state_dict({name: 1.5 * tensor for name, tensor in state.items()})
        elif kind == 1:
            layer.attention_norm.weight.mul_(1.5)
        elif kind == 2:
            layer.ffn_norm.weight = torch.nn.Parameter(1.5 * layer.ffn_norm.weight)
        elif kind == 3:
            layer.attention.wo.bias.data = 1 + layer.attention.wo.bias.data
        elif kind == 4:
            layer.attention.cache_k = layer.attention.cache_k.clone()
        elif kind == 5:
            layer.feed_forward = model.layers[0].feed_forward
        else:
            model.bfloat16(), model.float()

    for kind in range(7):
        with torch.no_grad():
            change(llama.model, kind), change(plain.model, kind)
        assert torch.equal(step(llama, tokens, kind + 1), step(plain, tokens, kind + 1))
        before.append(step(llama, tokens, 0))
        step(plain, tokens, 0)
        assert torch.equal(before[-1], before[-2]) == (kind == 4)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@compiled
def test_the_number_of_threads_is_that_of_now(llama: Llama, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = [], cpu.run

    def noting(*arguments: Any, **named: Any) -> None:
        asked.append(torch.get_num_threads())
        run(*arguments, **named)

    monkeypatch.setattr(cpu, "run", noting)
    tokens = torch.arange(6).view(1, 6)
    for position, count in enumerate((threads, threads + 1, threads + 1, threads)):
        torch.set_num_threads(count)
        asked.clear()
        step(llama, tokens, position)
        assert count in asked  # at least the output layer is no part of what is recorded


@compiled
def test_autocast_runs_as_it_did(llama: Llama) -> None:
    tokens, plain = torch.arange(8).view(2, 4), unrecorded(llama)
    for position in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=position % 2 == 1):
            assert torch.equal(step(llama, tokens, position), step(plain, tokens, position))


def test_all_kinds_of_operations() -> None:
    """Views, operations in place, several results, results in the place of others."""
    x = torch.arange(12.0).view(3, 4)
    kept = torch.zeros(4)

    def function() -> Tensor:
        first, rest = x.split([1, 2])
        most, places = rest.max(dim=1)
        kept.add_(x[0])
        y = torch.empty_like(x)
        y[:1], y[1:] = first * 2, rest.flip(0).reshape(-1).view(2, 4)
        return (y.T.contiguous() @ y)[places] + most[:, None] + kept.softmax(0)

    capture = capture_calls(function)
    for _ in range(3):
        x.copy_(torch.randn(3, 4))
        before = kept.clone()
        capture.replay()
        found = capture.output.clone()
        kept.copy_(before)
        assert torch.equal(found, function())
        kept.copy_(before)


@pytest.mark.parametrize("asks", ["item", "shape"])
def test_what_depends_on_numbers_is_done_as_it_was(asks: str) -> None:
    x = torch.ones(3)

    def function() -> Tensor:
        twice = x.sum().item() > 0 if asks == "item" else len(x[x > 0]) > 0
        return x * 2 if twice else x * 3

    capture = capture_calls(function)
    assert torch.equal(capture.output, 2 * torch.ones(3))
    x.neg_()
    capture.replay()
    assert torch.equal(capture.output, -3 * torch.ones(3))


@compiled
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
def test_threads_wait_where_a_call_needs_what_others_wrote(calls: list[tuple[int, int, int]]) -> None:
    """Calls on a few memories, x = y + z, by more threads than cores: as if one came after the other."""
    start = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) / 8
    memories, expected = [row.clone() for row in start], [row.clone() for row in start]
    made = []
    for target, y, z in calls:
        arguments = (memories[y], memories[z], memories[target], 3000, 1, 0)
        made.append(cpu.Call("add_float", arguments, (memories[target],)))
        expected[target] = expected[y] + expected[z]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        cpu.CallList(made)()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.stack(memories), torch.stack(expected))
    assert cpu.find_waits(made)[0] is False, "the first call waits for none"
