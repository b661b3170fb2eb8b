"""Matrices rounded to 8 and 4 bits: how far off they are, beside plain rounding to nearest; what a model makes of it.

Plain rounding is written here: each group's largest number becomes the largest integer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import ARGS, ROOT, run_program, write_checkpoint
from torch import Tensor, nn

from llama import Llama, LlamaError
from llama.accelerate.fast_model import FastModel
from llama.accelerate.kernels import cpu
from llama.accelerate.quantization import BITS, GROUP, QuantizedMatrix, quantize_rows
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.parallel import Place

compiled = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
QUANTIZATIONS = ["int8", "int4"]
TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "The opposite of hot is cold. The opposite of big is small.",
    "English to French:\n\nsea => mer\nbread => pain\ncheese => fromage",
    "I am going to Paris, what should I see? Walk around Paris. The tower looks at the stars.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
]


def rounded_to_nearest(weight: Tensor, bits: int) -> Tensor:
    group, most = GROUP[bits], 2 ** (bits - 1) - 1
    numbers = F.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    scale = (numbers.abs().amax(-1, keepdim=True) / most).clamp(min=1e-30)
    return ((numbers / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def error(found: Tensor, weight: Tensor) -> float:
    return float((found.float() - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 64), (100, 96), (7, 20), (130, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_a_matrix(bits: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    matrix = QuantizedMatrix(weight, bits)
    unpacked = matrix.unpack()
    assert (unpacked.shape, unpacked.dtype) == (weight.shape, dtype)
    own, plain = error(unpacked, weight), error(rounded_to_nearest(weight, bits), weight)
    print(f"int{bits} {shape} {dtype}: {own:.5f}, to nearest {plain:.5f}")
    assert own < {8: 0.01, 4: 0.1}[bits]
    assert own < plain * {8: 1.05 if dtype == torch.float32 else 1.3, 4: 0.95}[bits]
    rows = torch.randint(shape[0], (2, 5), generator=generator)
    assert torch.equal(matrix.lookup(rows), unpacked[rows])
    held = matrix.nbytes
    whole = -(-shape[0] // 64) * 64 * -(-shape[1] // GROUP[bits]) * GROUP[bits]
    assert held == whole * (bits + 16 / GROUP[bits]) / 8


@pytest.mark.parametrize("bits", [8, 4])
def test_what_integers_can_say_is_kept(bits: int) -> None:
    """Integers times a power of two come back as they were, with their signs and the zeros among them."""
    half = 2 ** (bits - 1)
    weight = torch.randint(1 - half, half, (64, 128), generator=torch.Generator().manual_seed(1)).float() / 4
    weight[:, :: GROUP[bits]] = (1 - half) / 4 if bits == 8 else -half / 4
    weight[3] = 0
    assert torch.equal(QuantizedMatrix(weight, bits).unpack(), weight)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(bits: int, value: float) -> None:
    weight = torch.ones(64, 128)
    weight[5, 7] = value
    assert not torch.isfinite(QuantizedMatrix(weight, bits).unpack()[5, 7])


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x * 0.02,
    "ties": lambda x: (x * 4).round(),
    "of all sizes": lambda x: x * (x.roll(1) * 30).exp(),
    "next to nothing": lambda x: x * 1e-38 * (x.roll(1) * 3).exp(),
    "not finite": lambda x: x.where(x < 2, math.nan).where(x > -2, -math.inf),
    "signed zeros": lambda x: x.where(x.roll(1, 0) > 2, -0.0),
}


@compiled
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_round_as_torch_does(kind: str, bits: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Bit for bit, whatever the matrix."""
    for shape in [(1, 1), (7, 20), (64, 64), (100, 96), (130, 1000)]:
        weight = MATRICES[kind](torch.randn(shape, generator=generator)).to(dtype)
        matrix, expected = QuantizedMatrix(weight, bits), quantize_rows(weight, bits)
        found = matrix.by_rows()
        assert matrix.fast and torch.equal(found.words, expected.words)
        assert torch.equal(found.scales.isnan(), expected.scales.isnan())
        assert torch.equal(*(x.scales.nan_to_num().view(torch.int16) for x in (found, expected)))
        again = QuantizedMatrix(expected, bits, dtype).by_rows()
        assert torch.equal(again.words, expected.words) and torch.equal(again.scales.isnan(), expected.scales.isnan())


@pytest.mark.parametrize("bits", [8, 4])
def test_without_kernels(bits: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """The same numbers, looked up and multiplied."""
    weight, x = torch.randn(70, 100, generator=generator), torch.randn(3, 100, generator=generator)
    expected = QuantizedMatrix(weight, bits).unpack()
    monkeypatch.setattr(cpu, "library", lambda: None)
    matrix = QuantizedMatrix(weight, bits)
    assert not matrix.fast and torch.equal(matrix.unpack(), expected)
    assert torch.equal(matrix.lookup(torch.tensor([69, 0])), expected[[69, 0]])
    assert torch.equal(matrix.product(x), F.linear(x, expected))


@compiled
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_matrix(bits: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Up to rounding of x to 8 bits, whose error is bounded by half a step in each number."""
    weight = torch.randn(100, 200, generator=generator).to(dtype)
    matrix = QuantizedMatrix(weight, bits)
    for rows in (1, 2, 3, 4, 5, 9):
        x = torch.randn(rows, 200, generator=generator).to(dtype)
        step = F.pad(x.float(), (0, -200 % GROUP[bits])).unflatten(1, (-1, GROUP[bits])).abs().amax(-1) / 127
        bound = step.repeat_interleave(GROUP[bits], 1)[:, :200] / 2 @ matrix.unpack().float().abs().T  # (rows, 100)
        expected = x.float() @ matrix.unpack().float().T
        slack = expected.abs() * (2e-2 if dtype == torch.bfloat16 else 1e-5) + 1e-4
        assert bool(((matrix.product(x).float() - expected).abs() <= bound + slack).all())


@dataclass(frozen=True)
class Quality:
    """Of a model beside the one that it was made of: KL of its next words' chances, and the ratio of perplexities."""

    kl: float
    perplexity: float


def quality(model: nn.Module, whole: nn.Module, texts: list[list[int]]) -> Quality:
    divergence, losses = [], []
    with torch.no_grad():
        for tokens in texts:
            p, q = (m(torch.tensor([tokens]))[0].log_softmax(-1) for m in (whole, model))
            divergence.append((p.exp() * (p - q)).sum(-1).mean())
            following = torch.tensor(tokens[1:])[:, None]
            losses.append((p[:-1].gather(1, following) - q[:-1].gather(1, following)).mean())
    return Quality(float(torch.stack(divergence).mean()), math.exp(float(torch.stack(losses).mean())))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("endless"), endless=True)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["demo", "random"])
def test_error_of_a_model(place: Place, endless: Path, name: str, quantization: str) -> None:
    directory = ROOT / "demo/model" if name == "demo" else endless
    checkpoint = open_checkpoint(directory)
    whole, plain = (load_model(checkpoint, checkpoint.sizes, place) for _ in range(2))
    for layer in plain.modules():
        if hasattr(layer, "weight") and layer.weight.ndim == 2 and layer is not plain.tok_embeddings:
            layer.weight.data = rounded_to_nearest(layer.weight.data, BITS[quantization])
    llama = Llama.build(directory, device="cpu", dtype="float32", quantization=quantization)
    texts = [llama.tokenizer.encode(text, bos=True, eos=False) for text in TEXTS]
    ours, theirs = quality(llama.model, whole, texts), quality(plain, whole, texts)
    print(f"{name} {quantization}: {ours}, to nearest {theirs}")
    bounds = {"int8": (0.002, 1.02), "int4": (0.1, 1.25)}[quantization]
    assert ours.kl < bounds[0] and ours.perplexity < bounds[1]
    if quantization == "int4":
        assert ours.kl < theirs.kl


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.slow
def test_text_on_ranks(endless: Path, quantization: str) -> None:
    """All matrices are rounded on 1 and 2 ranks, each of which holds its share, and both go on from a text."""
    options = ["--temperature", "0", "--max_gen_len", "12", "--dtype", "float32", "--quantization", quantization]
    for ranks in (0, 2):
        done = run_program("-m", "llama", "complete", "hello", "--ckpt_dir", str(endless), *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > len("hello")
    llama = Llama.build(endless, device="cpu", quantization=quantization)
    assert isinstance(llama.model.fast, FastModel)
    packed = llama.model.fast.packed_matrices
    assert len(packed) == 7 * llama.model.params.n_layers + 1
    assert all(isinstance(matrix, QuantizedMatrix) for matrix in packed)


def test_other_names_are_refused(endless: Path) -> None:
    with pytest.raises(LlamaError, match="quantization is 'int3', expected None or one of int8, int4"):
        Llama.build(endless, device="cpu", quantization="int3")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_biases_without_kernels(tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized model whose layers have biases computes where nothing was compiled, too."""
    directory = write_checkpoint(tmp_path, replace(ARGS, qkv_bias=True, wo_bias=True, mlp_bias=True), endless=True)
    monkeypatch.setattr(cpu, "library", lambda: None)
    llama = Llama.build(directory, device="cpu", dtype="float32", quantization=quantization)
    found = torch.tensor(llama.score(["a text of some words"])[0].logprobs)
    llama.model.layers[0].register_forward_hook(lambda *_: None)  # now the model's own code runs, on the same numbers
    assert torch.tensor(llama.score(["a text of some words"])[0].logprobs) == pytest.approx(found, abs=1e-4)
