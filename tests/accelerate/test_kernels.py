"""Each function of llama/native against float64, over shapes, dtypes and instructions; and what becomes of the file.

Bounds are float32's roundings of a sum, eps * K times the sum of its terms' sizes, and bfloat16's of each result.
"""

import os
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.accelerate.kernels import cpu
from llama.accelerate.kernels import dispatch as kernels
from llama.accelerate.quantization import QuantizedMatrix
from llama.model import RMSNorm

few = settings(deadline=None, max_examples=30)
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [*range(1, 14), 70]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
ALL = 1 << 60
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]
# Instructions that not every processor with 64-byte vectors has. Optimized less, since that takes seconds to compile.
GENERAL = ["-O1", "-march=x86-64-v4"]
library_anew = cpu.library.__wrapped__
compiled = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")


@pytest.fixture(scope="module", params=["the processor's instructions", "general ones"])
def instructions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "general ones":
            patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            patch.setattr(cpu, "FLAGS", GENERAL)
            library = library_anew()
            if library is None:
                pytest.skip("the compiler makes nothing for x86-64-v4")
            patch.setattr(cpu, "library", lambda: library)
        cpu.FUNCTIONS.clear()
        yield request.param
    cpu.FUNCTIONS.clear()


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight: Tensor) -> Tensor:
    blocks = cpu.new_packed(weight)
    cpu.pack(weight, blocks)
    return blocks


def assert_within(found: Tensor, exact: Tensor, bound: Tensor, roundings: int = 1) -> None:
    """found is `exact`, float64, to `bound`; in bfloat16, after so many roundings of its own."""
    assert found.shape == exact.shape
    if found.dtype == torch.bfloat16:
        bound = bound + roundings * 1.01 * EPS[torch.bfloat16] / 2 * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


# --- packing ---------------------------------------------------------------------------------------------------------


@compiled
@few
@given(st.integers(1, 200), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2))
def test_packing_there_and_back(rows: int, words: int, dtype: torch.dtype, source: int) -> None:
    """Bit for bit, NaNs too; and whether W is whole, every other column of a matrix, or badly aligned in a file."""
    columns = words * 4 // dtype.itemsize
    bits = torch.randint(-(1 << 31), 1 << 31, (rows, words), generator=torch.Generator().manual_seed(rows))
    weight = bits.to(torch.int32).view(dtype)
    if source == 1:
        weight = weight.repeat_interleave(2, dim=1)[:, ::2]
    elif source == 2:
        weight = torch.cat([torch.zeros(1, dtype=dtype), weight.flatten()])[1:].view(rows, columns)
    blocks = packed(weight)
    assert blocks.shape == (-(-rows // 64), words, 64, 4 // dtype.itemsize)
    assert torch.equal(cpu.unpack(blocks, rows).view(torch.int32), bits.to(torch.int32))
    chosen = torch.tensor([[0, rows - 1], [rows // 2, rows // 3]])
    for which in (chosen, chosen.int(), chosen[0, 0], chosen[:0]):
        assert torch.equal(cpu.lookup(blocks, which).view(torch.int32), bits.to(torch.int32)[which])


@compiled
def test_rows_that_a_panel_lacks_are_zeros() -> None:
    blocks = torch.full((2, 3, 64, 1), torch.nan)
    cpu.pack(torch.ones(70, 3), blocks)
    assert torch.equal(blocks[1, :, :, 0], (torch.arange(64) < 6).float().expand(3, 64))


@compiled
def test_which_matrices_fit() -> None:
    fitting = [torch.zeros(3, 5), torch.zeros(3, 6, dtype=torch.bfloat16)]
    others = [torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(8), torch.zeros(2, 2, 2), torch.zeros(3, 4).half()]
    assert all(map(kernels.packs, fitting)) and not any(map(kernels.packs, others))
    assert not kernels.packs(torch.zeros(3, 4, device="meta"))


# --- products --------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [*product([1, 63, 64, 65, 200], [2, 34, 64, 130])])
def test_product(instructions: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = numbers(rows, columns, dtype=dtype, seed=rows)
    blocks = packed(weight)
    for count in ROWS:
        x = numbers(count, columns, dtype=dtype, seed=count)
        sizes = x.double().abs() @ weight.double().abs().T
        found = kernels.product(x, blocks, rows)
        assert found.dtype == dtype
        assert_within(found, x.double() @ weight.double().T, columns * EPS[torch.float32] * sizes)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_any_shape(dtype: torch.dtype) -> None:
    weight, x = numbers(70, 6, dtype=dtype), numbers(3, 5, 12, dtype=dtype, seed=1)
    blocks = packed(weight)
    whole = kernels.product(x[..., :6].contiguous(), blocks, 70)
    assert whole.shape == (3, 5, 70)
    assert torch.equal(kernels.product(x[..., :6], blocks, 70), whole)  # a view that isn't contiguous
    assert torch.equal(
        kernels.product(x.flatten()[1:7], blocks, 70), kernels.product(x.flatten()[1:7].clone(), blocks, 70)
    )
    assert torch.equal(kernels.product(x[1, 2, :6], blocks, 70), whole[1, 2])  # a row is computed as it is alone
    assert kernels.product(x[:0, :, :6], blocks, 70).shape == (0, 5, 70)


@compiled
def test_what_a_matrix_is_not_for_is_refused() -> None:
    """As torch does: else numbers of one size would be read as those of another, past the end."""
    blocks = packed(numbers(70, 6))
    for x in (numbers(2, 12), numbers(2, 3), numbers(2, 6, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="columns"):
            kernels.product(x, blocks, 70)
    integers, scales = torch.zeros(2, 1, 16, 64, 4, dtype=torch.uint8), torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="columns"):
        kernels.integer_product(numbers(2, 65), integers, scales, 70, 8)


def integer_blocks(integers: Tensor, bits: int) -> Tensor:
    """Of unsigned integers (N, groups, group), where quantization.py has them: (N / 64, groups, words, 64, 4)."""
    group = integers.shape[2]
    blocks = torch.zeros(-(-len(integers) // 64), integers.shape[1], group * bits // 32, 64, 4, dtype=torch.uint8)
    for number in range(group):
        word, place = divmod(number, 32 // bits)
        byte, high = divmod(place * bits, 8)
        column = F.pad(integers[:, :, number], (0, 0, 0, -len(integers) % 64)).unflatten(0, (-1, 64)).mT
        blocks[:, :, word, :, byte] |= column << high
    return blocks


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (70, 100), (130, 64), (64, 129)])
def test_integer_product(instructions: str, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> None:
    """Exact integers, of which groups are scaled and added."""
    groups = -(-columns // group)
    random = torch.Generator().manual_seed(rows)
    integers = torch.randint(1 << bits, (rows, groups, group), generator=random).to(torch.uint8)
    scales = torch.rand(rows, groups, generator=random).bfloat16()
    lying = F.pad(scales, (0, 0, 0, -rows % 64)).unflatten(0, (-1, 64)).mT.contiguous()
    blocks, weight = integer_blocks(integers, bits), integers.double() - (1 << bits - 1)
    for count in ROWS:
        x = numbers(count, columns, dtype=dtype, seed=count)
        x[0, : group // 2] = 0
        grouped = F.pad(x.float(), (0, groups * group - columns)).unflatten(1, (groups, group))  # (rows, groups, group)
        most = grouped.abs().amax(-1, keepdim=True)
        inverse = torch.full_like(most, 127) / most.where(most > 0, torch.inf)
        rounded = (grouped * inverse).round().double()
        parts = torch.einsum("mgk,ngk->mng", rounded, weight) * (most.double() / 127).mT * scales.double()
        found = kernels.integer_product(x, blocks, lying, rows, bits)
        assert_within(found, parts.sum(-1), (groups + 4) * EPS[torch.float32] * parts.abs().sum(-1))


# --- between the products --------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 15, 16, 64, 130])
def test_rms_norm(instructions: str, dim: int, dtype: torch.dtype) -> None:
    for count in ROWS:
        x, weight = numbers(count, dim, dtype=dtype, seed=count) * count, numbers(dim, dtype=dtype, seed=1)
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-3) * weight.double()
        assert_within(kernels.rms_norm(x, weight, 1e-3), exact, (dim + 4) * EPS[torch.float32] * exact.abs(), 2)
        norm = RMSNorm(dim, 1e-3).to(dtype)
        norm.weight.data = weight
        apart = kernels.rms_norm(x.view(-1, 1, dim), weight, 1e-3).squeeze(1) != norm(x)
        assert dtype == torch.float32 or apart.float().mean() <= 0.01, "rounded where the plain one rounds"


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 130, 20000])
def test_swiglu(instructions: str, count: int, dtype: torch.dtype) -> None:
    """Down to -80, from where on the result is 0 next to any other."""
    a, b = numbers(count, dtype=dtype) * torch.linspace(0, 20, count).to(dtype), numbers(count, dtype=dtype, seed=1)
    exact = F.silu(a.double()) * b.double()
    assert_within(kernels.swiglu(a, b), exact, 4 * EPS[torch.float32] * exact.abs() + 1e-30, 2)
    assert torch.equal(kernels.swiglu(a.repeat_interleave(2)[::2], b[None].expand(2, -1)[1]), kernels.swiglu(a, b))
    far = torch.tensor([100.0, -100, 1e4, -1e4, 0, -0.0], dtype=dtype)
    assert_within(kernels.swiglu(far, far), far.double().relu() ** 2, 4 * EPS[torch.float32] * far.double() ** 2, 2)


# --- attention -------------------------------------------------------------------------------------------------------


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


# --- all of them -----------------------------------------------------------------------------------------------------


def results(dtype: torch.dtype) -> list[Tensor]:
    weight, x = numbers(64 * 9 + 1, 64, dtype=dtype), numbers(20, 64, dtype=dtype, seed=1)
    integers = torch.arange(64 * 10 * 64).view(10, 1, 16, 64, 4).to(torch.uint8)
    sizes = {"head_dim": 32, "kv_heads": 3, "group": 2, "window": ALL, "seed": 3, "alike": False, "dtype": dtype}
    return [
        packed(weight),
        kernels.product(x, packed(weight), len(weight)),
        kernels.integer_product(x, integers, numbers(10, 1, 64, dtype=torch.bfloat16), len(weight), 8),
        kernels.rms_norm(x, x[0], 1e-5),
        kernels.swiglu(x.repeat(20, 1), x.repeat(20, 1)),
        attend(**sizes, room=40, seqlen=1, starts=[8, 0, 39])[0],
        attend(**sizes, room=200, seqlen=170, starts=[8, 0, 30])[0],
        QuantizedMatrix(weight, 4).integers.data,
    ]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Any number of them, whichever of Python's calls, and two at once."""
    expected, before, found = results(dtype), torch.get_num_threads(), []

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        found.append(results(dtype))

    try:
        for threads in (1, 2, 5):
            run(threads)
    finally:
        torch.set_num_threads(before)
    running = [threading.Thread(target=run, args=(threads,)) for threads in (1, 2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 5
    for result in found:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@compiled
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_lost(instructions: str, dtype: torch.dtype, value: float) -> None:
    weight, x = numbers(70, 64, dtype=dtype), numbers(7, 64, dtype=dtype, seed=1)
    damaged, odd = weight.clone(), x.clone()
    damaged[65, 2] = odd[2, 3] = value
    for a, b in ((odd, weight), (x, damaged), (odd, damaged)):
        found, expected = kernels.product(a, packed(b), 70), a.double() @ b.double().T
        assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    integers, scales = torch.ones(2, 1, 16, 64, 4, dtype=torch.uint8), torch.ones(2, 1, 64, dtype=torch.bfloat16)
    found = kernels.integer_product(odd, integers, scales, 70, 8)
    assert torch.equal(found.isfinite(), (torch.arange(7) != 2)[:, None].expand(7, 70))
    found = kernels.rms_norm(odd, x[0], 1e-5)
    assert torch.equal(found[2].isnan(), torch.full((64,), value != value) | (torch.arange(64) == 3))
    for a, b in ((odd, x), (x, odd)):
        assert torch.equal(kernels.swiglu(a, b).isfinite(), odd.isfinite())


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


# --- the compiled file -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, whose kernels are compiled fast and run slowly."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", ["-O0", "-march=native"])
    return tmp_path


def made(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


@compiled
def test_it_is_compiled_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_anew() is not None
    (library,) = made(home)
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(cpu, "compile_to", pytest.fail)
    assert library_anew() is not None
    assert made(home) == [library] and library.stat().st_mtime_ns == written


@compiled
@pytest.mark.parametrize("damage", ["nothing", "a beginning", "half", "all but a byte", "other"])
@pytest.mark.slow
def test_a_damaged_file_is_made_again(home: Path, damage: str) -> None:
    assert library_anew() is not None
    (library,) = made(home)
    whole = library.read_bytes()
    other = bytearray(whole)
    other[len(whole) // 2] ^= 1
    damaged = {
        "nothing": b"",
        "a beginning": whole[:100],
        "half": whole[: len(whole) // 2],
        "all but a byte": whole[:-1],
    }
    os.unlink(library)  # this process has it mapped
    library.write_bytes(damaged.get(damage, bytes(other)))
    assert not cpu.is_complete(library), "loading it would end this process"
    assert library_anew() is not None
    assert cpu.is_complete(library) and made(home) == [library]


@compiled
def test_several_may_compile_at_once(home: Path) -> None:
    found: list[object] = []
    running = [threading.Thread(target=lambda: found.append(library_anew())) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 3 and None not in found
    assert len(made(home)) == 1, "nothing else is left behind"


def failing_compiler(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "cc").write_text("#!/bin/sh\nexit 1\n")
    (home / "cc").chmod(0o755)
    patch.setenv("PATH", str(home))


def no_home(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HOME")
    patch.setattr("pwd.getpwuid", {}.__getitem__)


def home_is_a_file(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    patch.setenv("HOME", str(home / "file"))


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda home, patch: patch.setenv("PATH", str(home)), id="no compiler"),
        failing_compiler,
        no_home,
        home_is_a_file,
        pytest.param(lambda home, patch: patch.setenv("HOME", "/proc/self"), id="a home that can't be written"),
        pytest.param(lambda home, patch: patch.setattr(cpu, "SECONDS_TO_COMPILE", 0.001), id="no time"),
        pytest.param(lambda home, patch: patch.setattr(cpu, "FLAGS", ["-march=none"]), id="no such processor"),
    ],
)
def test_where_it_cannot_be_compiled_there_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    trouble(home, monkeypatch)
    assert library_anew() is None
    monkeypatch.setattr(cpu, "library", library_anew)
    assert not kernels.available(torch.zeros(1)) and not kernels.packs(torch.zeros(2, 2))


@compiled
def test_processors_with_short_vectors_have_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch's own products are faster, and compiling takes half a minute."""
    monkeypatch.setattr(cpu, "FLAGS", ["-O3", "-march=x86-64-v3"])
    assert library_anew() is None
