"""Decoding on a GPU, as it is built there: the texts of the CPU, from recorded steps, without a wait for each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARGS, PROMPTS, run_program, write_checkpoint

from llama import Llama
from llama.accelerate.kernels import cpu
from llama.accelerate.kernels import dispatch as kernels
from llama.accelerate.quantization import QuantizedMatrix
from llama.bench.measure import BandwidthMeter
from llama.model import Attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

OPTIONS = {"max_seq_len": 300, "max_batch_size": 5, "dtype": "float32"}
BATCHES = [[[5, 6, 7]], [[1] * 30, [9], [3, 4]], [[8] * 3] * 5, [[7] * 120, [5], [2] * 126, [4]], [[1]] * 3]
LARGER = replace(ARGS, n_heads=4, n_kv_heads=2)
CASES = {
    "small heads": ARGS,
    "larger heads": LARGER,
    "tied": replace(LARGER, tied_embeddings=True),
    "windows": replace(LARGER, sliding_window=40, sliding_layers=(1,), qkv_bias=True, qk_norm=True),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cuda")
    return {name: write_checkpoint(root / name.replace(" ", "-"), args, endless=True) for name, args in CASES.items()}


@pytest.fixture(params=["with kernels", "without"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "without":
        monkeypatch.setattr(kernels, "gpu_kernels", lambda: None)
    return request.param != "without"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU, but for an event, is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(llama: Llama, cpu: Llama) -> None:
    for prompts in BATCHES:
        expected = cpu.generate(prompts, 40, temperature=0, logprobs=True)
        found = llama.generate(prompts, 40, temperature=0, logprobs=True)
        assert found[0] == expected[0]
        for mine, theirs in zip(found[1], expected[1], strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_the_cpu(checkpoints: dict[str, Path], triton: bool, name: str) -> None:
    """Of ragged batches that shrink, and are filled up; and no size of them is recorded twice."""
    llama, cpu = (Llama.build(checkpoints[name], **OPTIONS, device=device) for device in ("cuda", "cpu"))
    assert llama.engine.stepper.runs_ahead
    for _ in range(2):
        assert_same(llama, cpu)
    captures = llama.model.fast.steps.captured.captures
    assert {size for size, *_ in captures} == {1, 4, 5}
    whole = triton and CASES[name].head_size % cpu.LANES == 0
    assert {end for _, end, _ in captures} == ({None} if whole else {128, 256})
    assert llama.model.fast.network.kernels == triton


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_other_forms(checkpoints: dict[str, Path], triton: bool, quantization: str | None, compile: bool) -> None:
    """Quantized matrices are those of the CPU, whose kernels round x too: it's compared with what has none."""
    directory = checkpoints["larger heads"]
    llama = Llama.build(directory, **OPTIONS, device="cuda", quantization=quantization, compile=compile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        assert_same(llama, Llama.build(directory, **OPTIONS, device="cpu", quantization=quantization))
    assert llama.model.fast.steps.captured is not None


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_token_is_waited_for(checkpoints: dict[str, Path], triton: bool, temperature: float) -> None:
    """Once prompts are read. Rows end at different times, by length and by stop tokens."""
    llama = Llama.build(checkpoints["larger heads"], **OPTIONS, device="cuda")
    prompts = [[1] * 280, [2] * 7, [3] * 200]
    llama.tokenizer.stop_tokens = set(range(0, 256, 16))
    for _ in range(2):  # the first time steps are recorded
        llama.engine.maker.seeds.times_given.clear()
        expected = list(llama.stream(prompts, 90, temperature, logprobs=True))
    llama.engine.maker.seeds.times_given.clear()
    stream = llama.stream(prompts, 90, temperature, logprobs=True)
    found = [next(stream)]
    with no_waiting():
        found += stream
    assert [[replace(step, logprob=None) for step in steps] for steps in found] == [
        [replace(step, logprob=None) for step in steps] for steps in expected
    ]


def test_sampled_texts_are_those_of_the_cpu(checkpoints: dict[str, Path], triton: bool) -> None:
    here, cpu = (Llama.build(checkpoints["larger heads"], **OPTIONS, device=device) for device in ("cuda", "cpu"))
    options = {"temperature": 0.8, "max_gen_len": 40}
    assert here.text_completion(PROMPTS, **options) == cpu.text_completion(PROMPTS, **options)


def test_long_prompts_in_chunks(checkpoints: dict[str, Path], triton: bool) -> None:
    """Of which all but the first look at what is cached: with a mask, or a window."""
    for name in ("larger heads", "windows"):
        options = {**OPTIONS, "prefill_chunk": 64}
        here, cpu = (Llama.build(checkpoints[name], **options, device=device) for device in ("cuda", "cpu"))
        assert_same(here, cpu)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_bfloat16_is_near(checkpoints: dict[str, Path], triton: bool, quantization: str | None) -> None:
    options = {**OPTIONS, "quantization": quantization}
    llama = Llama.build(checkpoints["larger heads"], **{**options, "dtype": "bfloat16"}, device="cuda")
    exact = Llama.build(checkpoints["larger heads"], **options, device="cuda")
    tokens = torch.arange(60, device="cuda").view(3, 20)
    for begin, end in ((0, 10), (10, 11), (11, 12), (12, 18), (18, 19)):
        found, expected = (x.model(tokens[:, begin:end], begin) for x in (llama, exact))
        assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_model_that_was_changed_is_recorded_anew(checkpoints: dict[str, Path], triton: bool) -> None:
    llama, cpu = (Llama.build(checkpoints["larger heads"], **OPTIONS, device=device) for device in ("cuda", "cpu"))
    assert_same(llama, cpu)
    llama.model.cpu()
    for layer in llama.model.layers:
        layer.attention.cache_k = layer.attention.cache_v = None
    llama.model.cuda()
    assert_same(llama, cpu)


def test_attention_copies_no_keys(place: object, triton: bool) -> None:
    """Of one token or of many: what it takes of memory, masks aside, is less than the keys of all query heads."""
    args = replace(LARGER, dim=256, n_heads=16, n_kv_heads=1, head_dim=64, max_seq_len=8192, max_batch_size=1)
    with torch.device("cuda"):
        layer = Attention(args).to(torch.bfloat16)
    for length, start in ((1, 8000), (64, 8000)):
        x = [torch.randn(1, length, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (16, 1, 1)]
        angles = torch.polar(*torch.ones(2, length, 32, device="cuda"))
        seen = torch.arange(start + length, device="cuda") <= start + torch.arange(length, device="cuda")[:, None]
        layer.caches(x[0])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            layer.attend(*x, start, angles, None if length == 1 else seen[None, None])
        masks = 4 * 16 * length * (start + length)  # that of each query head, as bools and as numbers
        assert torch.cuda.max_memory_allocated() - before < 8192 * 16 * 64 * 2 + (masks if length > 1 else 0)


def test_bandwidth_is_that_of_a_gpu() -> None:
    assert BandwidthMeter(torch.device("cuda")).measure() > 50e9


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("options", [(), ("--compile",), ("--quantization", "int4")])
def test_on_ranks(checkpoints: dict[str, Path], options: tuple[str, ...]) -> None:
    sampling = ("--temperature", "0", "--max_gen_len", "20", "--dtype", "float32", "--device", "cuda")
    command = ("-m", "llama", "complete", "hello", "--ckpt_dir", str(checkpoints["larger heads"]), *sampling, *options)
    one, two = run_program(*command), run_program(*command, ranks=2, timeout=300)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert two.stdout == one.stdout


def test_rounded_matrices_of_many_rows(triton: bool) -> None:
    weight = torch.randn(100, 96, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for bits in (8, 4):
        matrix = QuantizedMatrix(weight, bits)
        for rows in (1, 16, 17, 200):
            x = torch.randn(rows, 96, device="cuda")
            assert torch.allclose(matrix.product(x), x @ matrix.unpack().T, atol=1e-3)
