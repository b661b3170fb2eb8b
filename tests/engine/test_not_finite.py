"""A weight that isn't finite is told by its name at the first step, whatever the length of the prompt and the form.

Prompts of every short length, since torch's fused attention on a CPU hides NaN for some lengths and not for others.
"""

import math
from pathlib import Path

import pytest
import torch
from tiny import ARGS, write_checkpoint

from llama import Llama, LlamaError

ATTENTION = "layers.1.attention."
NAMES = [f"{ATTENTION}wq.weight", f"{ATTENTION}wk.weight", f"{ATTENTION}wv.weight", "layers.0.ffn_norm.weight"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("not_finite"), ARGS, endless=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def llama(request: pytest.FixtureRequest, checkpoint: Path) -> Llama:
    return Llama.build(checkpoint, max_seq_len=32, max_batch_size=2, device="cpu", dtype=request.param)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["everywhere", "in one place"])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_weight_is_named(llama: Llama, name: str, where: str, value: float) -> None:
    weight = dict(llama.model.named_parameters())[name]
    before = weight.detach().clone()
    with torch.no_grad():
        if where == "everywhere":
            weight.fill_(value)
        else:
            weight[-1] = value
    try:
        for length in range(1, 20):
            with pytest.raises(LlamaError, match=f"are not finite in {llama.model.dtype}: {name} has [0-9,]+ of"):
                llama.generate([list(range(1, 1 + length)), [3]], 2, temperature=0)
        with pytest.raises(LlamaError, match=name):
            llama.score(["a text"])
        with pytest.raises(LlamaError, match=name):
            llama.generate([[5]], 2, temperature=0, num_beams=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    llama.generate([[1, 2]], 2, temperature=0)


def test_a_row_by_hand_is_not_a_number_and_the_others_are_right(checkpoint: Path) -> None:
    """As by the plain formula: what isn't finite reaches every logit of its row, and no other row."""
    model = Llama.build(checkpoint, max_seq_len=32, max_batch_size=2, device="cpu", dtype="float32").model
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        expected = model(tokens, 0)
        model.tok_embeddings.weight[2] = math.nan
        got = model(tokens, 0)
    assert got[0, 1:].isnan().all()
    torch.testing.assert_close(got[1], expected[1])


def test_a_dtype_that_overflows_is_told(checkpoint: Path) -> None:
    llama = Llama.build(checkpoint, max_seq_len=32, device="cpu", dtype="float16")
    with torch.no_grad():
        llama.model.layers[0].ffn_norm.weight.fill_(3e4)
        llama.model.layers[0].feed_forward.w1.weight.fill_(3e4)
    with pytest.raises(LlamaError, match=r"not finite in torch.float16, though all weights are: build with dtype='flo"):
        llama.generate([[1, 2, 3]], 2)
