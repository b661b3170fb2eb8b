"""The attention kernel on a CPU against attention in float64: over shapes, dtypes, positions and windows."""

import kernel_numbers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_numbers import ALL, DTYPES, EPS, assert_within, attend, compiled, numbers
from torch import Tensor

from llama.accelerate.kernels import dispatch as kernels

instructions = kernel_numbers.instructions


@st.composite
def attentions(draw: st.DrawFn) -> dict:
    seqlen, rows = draw(st.sampled_from([1, 1, 2, 7, 65, 130])), draw(st.integers(1, 4))
    before = draw(st.sampled_from([0, 4, 15, 16, 39, 128]))
    return {
        "head_dim": draw(st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256])),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 8)),
        "room": seqlen + before,
        "seqlen": seqlen,
        "starts": draw(st.lists(st.integers(0, before), min_size=rows, max_size=rows)),
        "alike": draw(st.booleans()),
        "window": draw(st.sampled_from([1, 2, 15, 16, 17, 33, ALL])),
        "seed": draw(st.integers(0, 1000)),
    }


@compiled
@settings(deadline=None, max_examples=60)
@given(attentions(), st.sampled_from(DTYPES))
def test_attention(instructions: str, sizes: dict, dtype: torch.dtype) -> None:
    """Of several tokens, the weights are rounded as the values are, each by half of EPS at most."""
    found, exact, largest = attend(**sizes, dtype=dtype)
    assert found.dtype == dtype
    rounding = 0 if sizes["seqlen"] == 1 else EPS[dtype] / 2
    assert_within(found, exact, (1e-5 + rounding) * largest.expand(exact.shape))


@compiled
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_attention_looks_at_the_likeliest_wherever_it_stands(instructions: str, head_dim: int) -> None:
    """Scores that are far apart: sums are kept relative to the largest so far, which may come last."""
    room = 50
    for best in (0, 15, 16, 31, 47):
        cache_k = -torch.ones(1, 1, room, head_dim) * 20
        cache_k[0, 0, best] = 20
        cache_v = torch.arange(room).float()[None, None, :, None].expand(1, 1, room, head_dim).contiguous()
        caches = cache_k.transpose(1, 2), cache_v.transpose(1, 2)
        for seqlen in (1, 2):
            q, k, v = (torch.full((1, seqlen, heads, head_dim), x) for heads, x in ((3, 1.0), (1, -1.0), (1, 1.0)))
            none = torch.tensor([1.0, 0.0]).repeat(1, seqlen, head_dim // 2)
            found = kernels.attention(q, k, v, *caches, none, torch.tensor([room - seqlen]), ALL)
            assert torch.allclose(found, torch.full((1, seqlen, 3, head_dim), float(best)))


@compiled
def test_attention_rounds_queries_as_it_does_keys(instructions: str) -> None:
    """In bfloat16, after they were turned: scores are the queries' own numbers here, and large."""
    q, nothing = numbers(1, 1, 1, 16, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 16).bfloat16()
    none = torch.zeros(1, 1, 8)
    turns = torch.polar(none + 1, numbers(1, 1, 8, seed=1))
    pairs = torch.view_as_complex(q.float().unflatten(-1, (-1, 2))) * turns
    scores = torch.view_as_real(pairs).flatten(-2).bfloat16().double() * 64 / 16**0.5
    caches = [torch.eye(17)[None, None, :, :16].bfloat16() * size for size in (64, 1)]
    angles, last = torch.view_as_real(turns).flatten(2), torch.tensor([16])
    found = kernels.attention(q, nothing, nothing, *(c.transpose(1, 2) for c in caches), angles, last, ALL)
    assert_within(found, F.pad(scores, (0, 1)).softmax(-1)[..., :16], torch.full((1, 1, 1, 16), 1e-6))


@compiled
def test_attention_takes_positions_of_any_integers() -> None:
    q, k, v = (numbers(3, 1, heads, 32, seed=heads) for heads in (4, 2, 2))
    where, none, found = torch.tensor([8, 0, 5]), torch.tensor([1.0, 0.0]).repeat(1, 1, 16), []
    for positions in (where, where.int(), where.byte(), where.repeat_interleave(2)[::2]):
        caches = [numbers(3, 2, 9, 32, seed=i).transpose(1, 2) for i in (5, 6)]
        found.append(
            torch.cat(
                [kernels.attention(q, k, v, *caches, none, positions, ALL).flatten(), *map(Tensor.flatten, caches)]
            )
        )
    assert all(torch.equal(result, found[0]) for result in found)


@compiled
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("position", [0, 5, 16, 40])
@pytest.mark.parametrize("seqlen", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_nan_is_nan(instructions: str, dtype: torch.dtype, seqlen: int, position: int, which: int) -> None:
    """In the last token's query, key or value, or in what is cached before it."""
    q, k, v = (numbers(1, seqlen, heads, 32, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    cache_k, cache_v = (numbers(1, 2, 64, 32, dtype=dtype, seed=i) for i in (5, 6))
    before = max(position - 1, 0)
    (q[0, -1, 0], k[0, -1, 0], v[0, -1, 0], cache_k[0, 0, before], cache_v[0, 0, before])[which][3] = torch.nan
    none = torch.tensor([1.0, 0.0]).repeat(1, seqlen, 16)
    caches = cache_k.transpose(1, 2), cache_v.transpose(1, 2)
    found = kernels.attention(q, k, v, *caches, none, torch.tensor([position]), ALL)
    expected = torch.zeros(1, seqlen, 2, 2, 32, dtype=torch.bool)
    if which == 0:
        expected[0, -1, 0, 0] = True
    elif which == 1:
        expected[0, -1, 0] = True
    elif which == 3 and position:
        expected[0, :, 0] = True
    elif which == 2 or position:
        expected[0, :, 0, :, 3] = True  # 0 times NaN is NaN, for tokens before it too
    assert torch.equal(found.isnan(), expected.flatten(2, 3))
