"""Compiled decoding steps: the same text as without, and nothing compiled once the first answer has begun."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from tiny import ARGS, run_program, write_checkpoint

from llama import Llama, LlamaError
from llama.accelerate.decode_steps import DecodeSteps
from llama.accelerate.kernels import cpu
from llama.accelerate.quantization import BITS, QuantizedMatrix

OPTIONS = {"max_seq_len": 64, "max_batch_size": 3, "device": "cpu", "dtype": "float32"}
BATCHES = [[[5, 6, 7]], [[1] * 30, [9]], [[2], [3] * 11, [4] * 50], [[8] * 3] * 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), endless=True)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("quantization", [None, pytest.param("int4", marks=pytest.mark.slow)])
def test_text_is_the_same_and_nothing_is_compiled_in_an_answer(
    checkpoint: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over prompt lengths, batch sizes, and rows that finish at different times."""
    if quantization is not None:  # kernels round what they multiply to 8 bits, so that a last bit can become a percent
        monkeypatch.setattr("llama.accelerate.kernels.cpu.library", lambda: None)
    before = graphs()
    compiled = Llama.build(checkpoint, **OPTIONS, quantization=quantization, compile=True)
    after = graphs()
    assert after - before == 2, "one for a single row, one for any number of them"
    plain = Llama.build(checkpoint, **OPTIONS, quantization=quantization)
    for prompts in BATCHES:
        expected = plain.generate(prompts, None, temperature=0, logprobs=True)
        found = compiled.generate(prompts, None, temperature=0, logprobs=True)
        assert found[0] == expected[0]
        for mine, theirs in zip(found[1], expected[1], strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-4)
    assert graphs() == after


@pytest.mark.slow
def test_without_kernels_steps_are_compiled_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: attention is masked over a power of two of positions, of which each number is the same function."""
    monkeypatch.setattr("llama.accelerate.kernels.cpu.library", lambda: None)
    before = graphs()
    compiled = Llama.build(checkpoint, **{**OPTIONS, "max_seq_len": 300}, compile=True)
    after = graphs()
    plain = Llama.build(checkpoint, **{**OPTIONS, "max_seq_len": 300})
    for prompts in (*BATCHES, [[7] * 120]):
        found, expected = (llama.generate(prompts, 40, temperature=0)[0] for llama in (compiled, plain))
        assert found == expected
    assert after > before
    assert graphs() == after


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of whole vectors, which attention's kernel takes."""
    args = replace(ARGS, n_heads=4, n_kv_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("kernels"), args, endless=True)


@pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
def test_kernels_are_compiled_around(with_kernels: Path) -> None:
    """As on a GPU with Triton: each is one operation that torch doesn't look into."""
    plain, compiled = (Llama.build(with_kernels, **OPTIONS) for _ in range(2))
    before = graphs()
    fast = compiled.model.fast
    fast.steps = DecodeSteps(fast.network, compiled.model.params, compiled=True)
    fast.steps.warm_up(compiled.model.prepare)
    after = graphs()
    assert after - before == 2
    for prompts in BATCHES:
        assert compiled.generate(prompts, None, temperature=0) == plain.generate(prompts, None, temperature=0)
    assert graphs() == after


@pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
@pytest.mark.parametrize("bits", BITS.values())
def test_quantized_products_are_compiled_around(bits: int) -> None:
    """To the last bit: the same kernel multiplies the same numbers."""
    matrix = QuantizedMatrix(torch.randn(80, 96), bits)
    compiled = torch.compile(lambda x: matrix.product(x), fullgraph=True, dynamic=True)
    for bsz in (1, 3):
        x = torch.randn(bsz, 1, 96)
        assert torch.equal(compiled(x), matrix.product(x))


@pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
def test_with_kernels_every_size_is_recorded_before_the_first_answer(with_kernels: Path) -> None:
    before = graphs()
    plain = Llama.build(with_kernels, **OPTIONS)
    ready = Llama.build(with_kernels, **OPTIONS, compile=True)
    captures = ready.model.fast.steps.captured.captures
    before_answers = dict(captures)
    assert {size for size, *_ in captures} == {1, 2, 3}
    for prompts in BATCHES:
        assert ready.generate(prompts, None, temperature=0) == plain.generate(prompts, None, temperature=0)
    assert captures == before_answers
    assert graphs() == before, "torch compiles nothing here"


@pytest.mark.slow
def test_on_ranks(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--temperature", "0", "--max_gen_len", "8", "--dtype", "float32", "--device", "cpu"]
    command = ("-m", "llama", "complete", "hello", "--ckpt_dir", str(checkpoint), *options)
    plain = run_program(*command)
    compiled = run_program(*command, "--compile", ranks=2, timeout=300)
    assert (plain.returncode, compiled.returncode) == (0, 0), plain.stderr + compiled.stderr
    assert compiled.stdout == plain.stdout


def test_no_compiler_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlamaError, match=r"compile=True needs a C\+\+ compiler, and none is here"):
        Llama.build(checkpoint, **OPTIONS, compile=True)
