"""Edits of a model with quantized matrices, whose fast form runs on every processor: each holds from the next step on.

The oracle is the same edit of a plain model that holds the numbers which the quantized matrices stand for. The edits
are such that quantizing again loses nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from tiny import ARGS, write_checkpoint
from torch import nn

from llama import Llama, Transformer
from llama.accelerate.fast_model import FastModel

OPTIONS = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu", "dtype": "float32"}
PROMPTS = [[1, 2, 3, 4, 5], [9, 8]]
EDITS: dict[str, Callable[[Transformer], object]] = {
    "in place": lambda m: m.layers[1].attention.wo.weight.mul_(2),
    "data": lambda m: m.layers[0].feed_forward.w2.weight.data.mul_(-4),
    "zeros": lambda m: m.layers[1].attention.wq.weight.zero_(),
    "parameter replaced": lambda m: setattr(
        m.layers[1].attention.wv, "weight", nn.Parameter(2 * m.layers[1].attention.wv.weight)
    ),
    "named_parameters": lambda m: [p.data.mul_(0.5) for name, p in m.named_parameters() if name.endswith("w1.weight")],
    "modules": lambda m: [x.weight.data.mul_(2) for x in m.modules() if hasattr(x, "weight")],
    "state_dict": lambda m: m.state_dict()["layers.0.feed_forward.w3.weight"].mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({name: 2 * tensor for name, tensor in m.state_dict().items()}),
    "a norm": lambda m: m.layers[0].ffn_norm.weight.mul_(2),
    "eps": lambda m: setattr(m.layers[0].ffn_norm, "eps", 3.0),
    "a layer's forward": lambda m: setattr(m.layers[0].feed_forward, "forward", lambda x: 0.5 * x),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda layer, args, output: 2 * output),
    "a hook before": lambda m: m.layers[1].register_forward_pre_hook(lambda layer, args: (2 * args[0], *args[1:])),
    "a layer deleted": lambda m: m.layers.__delitem__(1),
}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same products on every processor: kernels round what they multiply to 8 bits, and the oracle doesn't."""
    monkeypatch.setattr("llama.accelerate.kernels.cpu.library", lambda: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = replace(ARGS, n_heads=4, n_kv_heads=2, qk_norm=True)
    return write_checkpoint(tmp_path_factory.mktemp("quantized"), args, endless=True)


def build(checkpoint: Path) -> tuple[Llama, Transformer]:
    """A quantized model, and a plain one of the same numbers."""
    llama = Llama.build(checkpoint, **OPTIONS, quantization="int8")
    assert isinstance(llama.model.fast, FastModel)
    expected = Transformer(llama.model.params).eval()
    expected.load_state_dict({name: tensor.clone() for name, tensor in llama.model.state_dict().items()})
    return llama, expected


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "after an answer"])
@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_an_edit_holds(checkpoint: Path, name: str, warm: bool) -> None:
    llama, expected = build(checkpoint)
    tokens = torch.tensor([PROMPTS[0]])
    before = expected(tokens)
    if warm:
        llama.generate(PROMPTS, 8, temperature=0)
    EDITS[name](llama.model), EDITS[name](expected)
    text = llama.generate(PROMPTS, 8, temperature=0)[0]
    assert text == Llama(expected, llama.tokenizer).generate(PROMPTS, 8, temperature=0)[0]
    for length, start in ((5, 0), (1, 5), (1, 6)):
        assert_close(llama.model(tokens[:, :length], start), expected(tokens[:, :length], start))
    assert not torch.equal(expected(tokens), before), "the edit changes something"


@torch.no_grad()
def test_an_edit_between_two_steps_of_a_stream_holds_from_the_next_one(checkpoint: Path) -> None:
    llama, expected = build(checkpoint)
    streams = [x.stream([PROMPTS[0]], 12, temperature=0) for x in (llama, Llama(expected, llama.tokenizer))]
    texts = [[next(stream)[0].token for _ in range(3)] for stream in streams]
    for model in (llama.model, expected):
        model.layers[0].feed_forward.w2.weight.mul_(-4)
    texts = [[*text, *(step.token for (step,) in stream)] for text, stream in zip(texts, streams, strict=True)]
    assert texts[0] == texts[1] != llama.generate([PROMPTS[0]], 12, temperature=0)[0][0]
