"""The CPU kernels but attention, against the same in float64: over shapes, dtypes, instructions and threads."""

import threading
from itertools import product

import kernel_numbers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_numbers import ALL, DTYPES, EPS, assert_within, attend, compiled, numbers, packed
from torch import Tensor

from llama.accelerate.kernels import cpu
from llama.accelerate.kernels import dispatch as kernels
from llama.accelerate.quantization import QuantizedMatrix
from llama.model import RMSNorm

instructions = kernel_numbers.instructions
few = settings(deadline=None, max_examples=30)
ROWS = [*range(1, 14), 70]
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]

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
    assert all(map(kernels.can_pack, fitting)) and not any(map(kernels.can_pack, others))
    assert not kernels.can_pack(torch.zeros(3, 4, device="meta"))


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


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 70])
def test_sums_are_torch_s(instructions: str, columns: int, dtype: torch.dtype) -> None:
    """Of as many numbers, and of a row that is added to each row; to the bit."""
    for rows in (1, 2, 7):
        x, z = numbers(rows, 1, columns, dtype=dtype), numbers(rows, 1, columns, dtype=dtype, seed=1)
        assert torch.equal(cpu.add(x, z), x + z)
        assert torch.equal(cpu.add(x, z[0, 0]), x + z[0, 0])
        assert torch.equal(cpu.add(x.repeat_interleave(2, -1)[..., ::2], z), x + z)


@compiled
@few
@given(st.integers(1, 150), st.integers(1, 20), st.sampled_from(DTYPES), st.integers(-3, 200), st.booleans())
def test_rows_of_an_embedding(rows: int, words: int, dtype: torch.dtype, first: int, is_packed: bool) -> None:
    """As they lie in the matrix, packed or plain; zeros for tokens that it doesn't have."""
    columns = words * 4 // dtype.itemsize
    weight = numbers(rows, columns, dtype=dtype)
    tokens = torch.tensor([[first, first + rows - 1], [first - 1, first + rows], [-1, 1 << 40]])
    place = tokens - first
    expected = weight[place.clamp(0, rows - 1)].where(((place >= 0) & (place < rows))[..., None], 0)
    found = cpu.embed(tokens, packed(weight) if is_packed else weight, rows, columns, first)
    assert torch.equal(found, expected)


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
