"""The Triton kernels against torch's own operations: on a GPU where there is one, else in Triton's interpreter.

The interpreter multiplies no matrices of bfloat16, and knows no GPU: what is launched, and how, only a GPU tests.
"""

import importlib.util
import os
import subprocess
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, environment, launched
from torch import Tensor

from llama.accelerate.kernels import dispatch as kernels
from llama.accelerate.quantization import QuantizedMatrix
from llama.kv_cache import attention_mask
from llama.model import Attention, ModelArgs, RMSNorm, precompute_freqs_cis

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MULTIPLIED = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SHARE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest number, for roundings
ALL = 1 << 60


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """triton.py. Without a GPU, in a process where Triton interprets, which takes long for many programs."""
    if DEVICE == "cuda":
        assert kernels.gpu_kernels() is not None, "there is a GPU, but kernels don't run"
    elif not INTERPRETED:
        pytest.skip("no GPU")
    module = importlib.import_module("llama.accelerate.kernels.triton")
    if INTERPRETED:
        monkeypatch.setattr(module, "PROGRAMS", 16)
    return module


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
def test_all_in_the_interpreter() -> None:
    """Which Triton decides as it is imported: in a process of its own."""
    environ = {**environment(), "TRITON_INTERPRET": "1"}
    done = subprocess.run(launched("-m", "pytest", __file__), cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "no GPU" not in done.stdout, done.stdout


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    expected = expected.float()
    assert float((found.float() - expected).abs().max()) <= SHARE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", SHARE)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 2, 100), (2, 5000)])
def test_rms_norm(gpu: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, norm = numbers(*shape, dtype=dtype), RMSNorm(shape[-1], eps=1e-3).to(DEVICE)
    norm.weight.data = numbers(shape[-1], dtype=dtype, seed=1).float()
    expected = norm(x.float()).detach()
    assert_near(gpu.rms_norm(x, norm.weight.to(dtype), 1e-3), expected, dtype)
    assert_near(
        gpu.rms_norm(x.transpose(0, -1).contiguous().transpose(0, -1), norm.weight.to(dtype), 1e-3), expected, dtype
    )


@pytest.mark.parametrize("dtype", SHARE)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 700), (2, 3, 1024)])
def test_swiglu(gpu: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = (numbers(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    assert_near(gpu.swiglu(a, b), F.silu(a.float()) * b.float(), dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("shape", [(64, 64), (100, 200), (7, 20), (130, 1000)])
def test_integer_product(gpu: ModuleType, bits: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every number of rows that it takes, the last one's included."""
    quantized = QuantizedMatrix(numbers(*shape, dtype=dtype), bits)
    for count in (1, 3, 16):
        x = numbers(count, shape[1], dtype=dtype, seed=count)
        expected = x.float() @ quantized.unpack().float().T
        assert_near(
            gpu.integer_product(x[:, None], quantized.integers, quantized.scales, shape[0], bits)[:, 0], expected, dtype
        )


HEADS = {"group": (8, 2, 64), "odd size": (4, 4, 48), "one for all": (4, 1, 16), "large": (2, 2, 128)}


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("bsz", [1, 3])
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(
    gpu: ModuleType, place: object, heads: str, dtype: torch.dtype, bsz: int, window: int | None
) -> None:
    """And the caches after it. Of rows at the first position, at the last, and between."""
    n_heads, kv_heads, size = HEADS[heads]
    args = ModelArgs(n_heads * size, 1, n_heads, kv_heads, 10, max_batch_size=4, max_seq_len=150)
    layer = Attention(args)
    q, k, v = (numbers(bsz, 1, count, size, dtype=dtype, seed=count) for count in (n_heads, kv_heads, kv_heads))
    layer.caches(q)
    caches = (layer.cache_k, layer.cache_v)
    for seed, cache in enumerate(caches):
        cache.copy_(numbers(*cache.shape, dtype=dtype, seed=seed))
    own = [cache.transpose(1, 2).clone().transpose(1, 2) for cache in caches]
    positions = torch.tensor([149, 0, 77], device=DEVICE)[:bsz]
    angles = precompute_freqs_cis(size, 150).to(DEVICE)[positions][:, None]
    with torch.no_grad():
        expected = layer.attend(q, k, v, positions, angles, attention_mask(positions[:, None], 150, window))
    real = torch.view_as_real(angles).reshape(bsz, 1, size)
    assert_near(gpu.attention(q, k, v, *own, real, positions, window or ALL), expected, dtype)
    for mine, theirs in zip(own, caches, strict=True):
        assert_near(mine, theirs, dtype)


@pytest.mark.parametrize("slots", [[4, 0, 2], [1, 2, 3]])
def test_rows_use_their_own_slots(gpu: ModuleType, slots: list[int]) -> None:
    """As the same rows of other caches, in which they lie in order; a row without a token writes nothing."""
    q, k, v = (numbers(3, 1, count, 32, dtype=torch.float32, seed=count) for count in (4, 2, 2))
    before = [numbers(5, 2, 40, 32, dtype=torch.float32, seed=seed) for seed in (0, 1)]
    mine, theirs = ([cache.clone().transpose(1, 2) for cache in part] for part in (before, [x[slots] for x in before]))
    angles, positions = numbers(3, 1, 32, dtype=torch.float32), torch.tensor([30, 7, -1], device=DEVICE)
    found = gpu.attention(q, k, v, *mine, angles, positions, 12, torch.tensor(slots, device=DEVICE))
    expected = gpu.attention(q, k, v, *theirs, angles, positions, 12)
    assert torch.equal(found[:2], expected[:2])
    others = [slot for slot in range(5) if slot not in slots]
    for cache, own, old in zip(mine, theirs, before, strict=True):
        assert torch.equal(cache[slots], own)
        assert torch.equal(cache.transpose(1, 2)[others], old[others])


def test_where_no_token_is_nothing_is_written(gpu: ModuleType) -> None:
    q, k, v = (numbers(2, 1, count, 32, dtype=torch.float32, seed=count) for count in (4, 2, 2))
    caches = [numbers(2, 2, 9, 32, dtype=torch.float32, seed=seed).transpose(1, 2) for seed in (0, 1)]
    before = [cache.clone() for cache in caches]
    angles = numbers(1, 1, 32, dtype=torch.float32)
    both = gpu.attention(q, k, v, *caches, angles, torch.tensor([5, -1], device=DEVICE), ALL)
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).any(-1)  # (rows, positions, heads)
        assert changed[0, 5].all() and int(changed.sum()) == 2
    alone = gpu.attention(q[:1], k[:1], v[:1], *caches, angles, torch.tensor([5], device=DEVICE), ALL)
    assert_near(both[:1], alone, torch.float32)


@pytest.mark.parametrize("where", ["query", "key", "value", "cached key", "cached value"])
def test_nan_is_not_lost(gpu: ModuleType, where: str) -> None:
    q, k, v = (numbers(1, 1, count, 32, dtype=torch.float32, seed=count) for count in (4, 2, 2))
    caches = [numbers(1, 2, 9, 32, dtype=torch.float32, seed=seed).transpose(1, 2) for seed in (0, 1)]
    damaged = {"query": q, "key": k, "value": v, "cached key": caches[0][:, 3], "cached value": caches[1][:, 3]}[where]
    damaged.view(-1, 32)[0, 4] = torch.nan
    angles = torch.view_as_real(precompute_freqs_cis(32, 9).to(DEVICE)[5:6]).reshape(1, 1, 32)
    found = gpu.attention(q, k, v, *caches, angles, torch.tensor([5], device=DEVICE), ALL)
    assert found[0, 0, 0].isnan().any() and found[0, 0, 3].isfinite().all()
