"""Recorded decoding steps, with a stand-in for CUDA graphs: what a step does is traced to a list of torch's operations.

As in a graph, a replay does the same operations on the same memory, and nothing of Python is left in it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, Twin, assert_close
from tiny import ARGS, write_checkpoint
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from llama import Llama
from llama.accelerate.call_capture import Capture
from llama.accelerate.fast_model import FastModel
from llama.accelerate.kernels import cpu
from llama.accelerate.plain_weights import Watch
from llama.model import Transformer

OPTIONS = {"max_seq_len": 300, "max_batch_size": 5, "device": "cpu", "dtype": "float32"}
BATCHES = [[[5, 6, 7]], [[1] * 30, [9], [3, 4]], [[8] * 3] * 5, [[7] * 120, [5], [2] * 126, [4]], [[1]] * 3]


class Capturer:
    """Runs a function, as is done before it is recorded, and then keeps its operations."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[[], Tensor]) -> Capture:
        self.count += 1
        output = function().clone()
        operations = make_fx(function)()
        return Capture(lambda: output.copy_(operations()), output)


def captured(model: Transformer, capture: Capturer) -> Transformer:
    """The model with a fast form whose steps are captured by the stand-in, as on a GPU without Triton."""
    watch = Watch() if model.fast is None else model.fast.watch
    model.fast = FastModel(model, watch, None, compile=False, choose_capture=lambda *_: capture)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = replace(ARGS, n_heads=4, n_kv_heads=2, sliding_window=40, sliding_layers=(1,))
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), args, endless=True)


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without Triton: torch's own operations, which can be traced."""
    monkeypatch.setattr(cpu, "library", lambda: None)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.usefixtures("fallback")
def test_texts_are_the_same(checkpoint: Path, ahead: bool) -> None:
    """Of ragged batches that shrink: each power of two of rows and of positions is recorded once."""
    plain, llama, capture = Llama.build(checkpoint, **OPTIONS), Llama.build(checkpoint, **OPTIONS), Capturer()
    captured(llama.model, capture)
    llama.engine.stepper.runs_ahead = ahead
    for prompts in (*BATCHES, *BATCHES):
        expected = plain.generate(prompts, 40, temperature=0, logprobs=True)
        found = llama.generate(prompts, 40, temperature=0, logprobs=True)
        assert found[0] == expected[0]
        for mine, theirs in zip(found[1], expected[1], strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-4)
    sizes = {(1, 128), (2, 128), (4, 128), (5, 128), (2, 256), (4, 256)}
    assert {
        (size, end) for size, end, *_ in llama.model.fast.steps.captured.captures
    } == sizes and capture.count == len(sizes)


@pytest.mark.usefixtures("fallback")
def test_what_fills_a_batch_up_changes_no_row(grouped: Twin) -> None:
    """Three rows step where the fourth, which has no part in it, holds a prompt; and it goes on as if nothing was."""
    plain, model = grouped.ours, captured(copy.deepcopy(grouped.ours), Capturer())
    tokens = grouped.tokens(4, 30)
    for rows, begin, end in ((4, 0, 20), (3, 20, 21), (3, 21, 22), (4, 20, 21), (1, 22, 23), (4, 23, 24), (2, 24, 27)):
        where = torch.arange(rows) + begin if end - begin == 1 and begin > 22 else begin
        expected = plain(tokens[:rows, begin:end], where)
        assert_close(model(tokens[:rows, begin:end], where), expected)


@pytest.mark.usefixtures("fallback")
def test_what_was_returned_stays(grouped: Twin) -> None:
    model = captured(copy.deepcopy(grouped.ours), Capturer())
    tokens = grouped.tokens(3, 4)
    first = model.hidden_states(tokens[:, :1], 0)
    before = first.clone()
    for position in range(1, 4):
        model.hidden_states(tokens[:, position : position + 1], position)
    assert torch.equal(first, before)


@pytest.mark.usefixtures("fallback")
def test_any_mode_and_any_integers(grouped: Twin) -> None:
    plain, model, capture = grouped.ours, copy.deepcopy(grouped.ours), Capturer()
    captured(model, capture)
    tokens = grouped.tokens(2, 12)
    for at, mode in enumerate((torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode)):
        for step, dtype in enumerate((torch.int64, torch.int32, torch.uint8)):
            position = 3 * at + step
            with mode():
                found = model(tokens[:, position : position + 1].to(dtype), torch.full((2,), position, dtype=dtype))
            assert_close(found, plain(tokens[:, position : position + 1], position))
    assert capture.count == 1


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.usefixtures("fallback")
def test_a_model_that_was_changed_is_recorded_anew(checkpoint: Path, quantization: str | None) -> None:
    """Its weights and caches lie elsewhere; a graph would read what is no longer there."""
    llama, capture = Llama.build(checkpoint, **OPTIONS, quantization=quantization), Capturer()
    plain = Llama.build(checkpoint, **OPTIONS, quantization=quantization).model
    model = captured(llama.model, capture)
    tokens = torch.arange(6).view(2, 3)

    def check() -> None:
        for position in range(3):
            step = tokens[:, position : position + 1], position
            assert_close(model(*step), plain(*step))

    check()
    assert capture.count == 1
    for changed in (model, plain):
        changed.load_state_dict({key: 1.5 * tensor for key, tensor in changed.state_dict().items()})
    check()
    for changed in (model, plain):
        changed.train()
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(0.5)
        changed.eval()
    check()
    counts = capture.count
    for changed in (model, plain):
        changed.double()
        changed.float()
        for layer in changed.layers:
            layer.attention.cache_k = layer.attention.cache_v = None
    check()
    assert capture.count == counts + 1
    copied = copy.deepcopy(model)
    assert_close(copied(tokens[:, :1], 0), plain(tokens[:, :1], 0))
    assert capture.count == counts + 2, "the copy has captures of its own"
    check()
    assert capture.count == counts + 2


@pytest.mark.usefixtures("fallback")
def test_other_dtypes_run_as_they_did(grouped: Twin) -> None:
    model, capture = copy.deepcopy(grouped.ours), Capturer()
    captured(model, capture).double()
    assert_close(model(grouped.tokens(1, 1), 0), grouped.ours(grouped.tokens(1, 1), 0))
    assert capture.count == 0


@pytest.mark.usefixtures("fallback")
def test_the_last_position_is_a_rows_own(place: object) -> None:
    """Until max_seq_len is full, where what fills a batch up is written beyond it."""
    args = replace(CASES["grouped"], max_seq_len=5)
    plain = Transformer(args)
    model = captured(copy.deepcopy(plain), Capturer())
    tokens = torch.arange(20).view(4, 5)
    for position in range(5):
        for rows in (4, 3):
            step = tokens[:rows, position : position + 1], position
            assert_close(model(*step), plain(*step))
    assert model.layers[0].attention.cache_k.shape[1] == 6
