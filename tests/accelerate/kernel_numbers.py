"""What the tests of the CPU kernels share: instructions to compile for, random numbers, and bounds of errors.

Bounds are float32's roundings of a sum, eps * K times the sum of its terms' sizes, and bfloat16's of each result.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama.accelerate.kernels import cpu
from llama.accelerate.kernels import dispatch as kernels

DTYPES = [torch.float32, torch.bfloat16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
ALL = 1 << 60
LEVELS = [level.name for level in cpu.find_own_levels()]
compiled = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")


def library_anew() -> ctypes.CDLL | None:
    """The library of the processor's fastest level, looked for again."""
    return cpu.load_level.__wrapped__(*cpu.find_own_levels()[:1])


@pytest.fixture(scope="module", params=LEVELS or [cpu.NO_KERNELS])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of kernels that this processor has, in use."""
    cpu.choose_level(request.param)
    yield request.param
    cpu.choose_level(None)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight: Tensor) -> Tensor:
    blocks = cpu.allocate_packed(weight)
    cpu.pack(weight, blocks)
    return blocks


def assert_within(found: Tensor, exact: Tensor, bound: Tensor, roundings: int = 1) -> None:
    """found is `exact`, float64, to `bound`; in bfloat16, after so many roundings of its own."""
    assert found.shape == exact.shape
    if found.dtype == torch.bfloat16:
        bound = bound + roundings * 1.01 * EPS[torch.bfloat16] / 2 * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


def attend(
    head_dim: int,
    kv_heads: int,
    group: int,
    room: int,
    seqlen: int,
    starts: list[int],
    alike: bool,
    window: int,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(found, exact, what one weighed value is at most) of random numbers. alike: rows turn by the same angles.

    Angles are quarter turns in bfloat16, which turn without a rounding.
    """
    bsz = len(starts)
    q, k, v = (
        numbers(bsz, seqlen, heads, head_dim, dtype=dtype, seed=seed + i)
        for i, heads in enumerate((kv_heads * group, kv_heads, kv_heads))
    )
    before = [numbers(bsz + 1, kv_heads, room, head_dim, dtype=dtype, seed=seed + i) for i in (3, 4)]
    cache_k, cache_v = (cache.clone().transpose(1, 2) for cache in before)
    turns = numbers(1 if alike else bsz, seqlen, head_dim // 2, seed=seed + 5) * 3
    angles = torch.polar(torch.ones_like(turns), turns)
    if dtype == torch.bfloat16:
        angles = torch.tensor([1, 1j, -1, -1j])[turns.long() % 4]
    real = torch.view_as_real(angles).flatten(2)
    found = kernels.attention(q, k, v, cache_k, cache_v, real, torch.tensor(starts), window)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * angles.to(torch.complex128)[:, :, None]
        return torch.view_as_real(pairs).flatten(-2)

    keys, values = (cache.double() for cache in before)
    exact = torch.empty(bsz, seqlen, kv_heads, group, head_dim, dtype=torch.float64)
    queries = turned(q).unflatten(2, (kv_heads, group))
    for row, start in enumerate(starts):
        new = slice(start, start + seqlen)
        keys[row, :, new], values[row, :, new] = turned(k)[row].transpose(0, 1), v[row].double().transpose(0, 1)
        for t, end in enumerate(range(start + 1, start + 1 + seqlen)):
            seen = slice(max(end - window, 0), end)
            scores = queries[row, t] @ keys[row, :, seen].mT / head_dim**0.5
            exact[row, t] = scores.softmax(-1) @ values[row, :, seen]
    assert torch.equal(cache_v.transpose(1, 2).double(), values), "the new value is there, and no other has changed"
    apart = (cache_k.transpose(1, 2).double() - keys).abs()
    assert float(apart.max()) <= 4 * EPS[torch.float32] * float(k.abs().max())
    assert int(apart.count_nonzero()) <= k.numel(), "no other key has changed"
    return found, exact.flatten(2, 3), values.abs().max()
