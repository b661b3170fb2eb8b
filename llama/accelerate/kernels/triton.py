"""The functions of cpu.py on a GPU, in Triton: norm, SwiGLU, product with a quantized matrix, attention of one token.

Knows tensors; knows no layers. Only `dispatch.gpu_kernels` imports it, where there are Triton and a GPU. Every function
launches and returns, and reads no tensor's values on the CPU, so that a CUDA graph can capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import MOST_ROWS_ON_GPU

PROGRAMS = 256  # enough to keep a large GPU busy
KEYS = {2: 64, 4: 16}  # positions that a program reads together, by the bytes of a number
WORDS = {2: 64, 4: 32}  # 4 bytes each, of a row of a quantized matrix, that a program reads together
ROWS = 16  # of that matrix, of a program


@triton.jit
def _rms_norm(x, weight, y, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    i = tl.arange(0, BLOCK)
    numbers = tl.load(x + row + i, mask=i < dim, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers) / dim + eps)
    result = numbers * scale * tl.load(weight + i, mask=i < dim, other=0.0).to(tl.float32)
    tl.store(y + row + i, result.to(y.dtype.element_ty), mask=i < dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.RMSNorm` over the last dimension."""
    x, dim = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _rms_norm[(x.numel() // dim,)](x, weight, y, dim, eps, BLOCK=block, num_warps=8 if block > 2048 else 4)
    return y


@triton.jit
def _swiglu(a, b, y, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(a + i, mask=i < count, other=0.0).to(tl.float32)
    numbers = tl.load(b + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, (gate * tl.sigmoid(gate) * numbers).to(y.dtype.element_ty), mask=i < count)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of the same shape."""
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    with torch.cuda.device_of(a):
        _swiglu[(triton.cdiv(a.numel(), 1024),)](a, b, y, a.numel(), BLOCK=1024)
    return y


@triton.jit
def _integer_product(
    x,
    words,
    scales,
    y,
    count,
    rows,
    columns,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The product with ROWS rows of W: WORDS words of each at a time, whose 4 bytes or 8 half-bytes follow in turn."""
    PARTS: tl.constexpr = 32 // BITS
    PER_GROUP: tl.constexpr = GROUP // PARTS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (row // BLOCK).to(tl.int64) * groups  # of the first group of the block
    m = tl.arange(0, COUNT)
    total = tl.zeros((COUNT, ROWS), tl.float32)
    for start in range(0, groups * PER_GROUP, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = (word < groups * PER_GROUP)[:, None] & (row < rows)[None, :]
        packed = tl.load(
            words + (here[None, :] * PER_GROUP + word[:, None]) * BLOCK + (row % BLOCK)[None, :], mask=inside, other=0
        )
        scale = tl.load(
            scales + (here[None, :] + (word // PER_GROUP)[:, None]) * BLOCK + (row % BLOCK)[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)  # (WORDS, ROWS)
        for part in tl.static_range(PARTS):
            integers = ((packed >> (part * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
            numbers = (integers.to(tl.float32) * scale).to(x.dtype.element_ty)
            column = word * PARTS + part
            read = (m < count)[:, None] & (column < columns)[None, :]
            factors = tl.load(x + m[:, None] * columns + column[None, :], mask=read, other=0.0)  # (COUNT, WORDS)
            total = tl.dot(factors, numbers, total, input_precision="ieee")
    tl.store(
        y + m[:, None] * rows + row[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < count)[:, None] & (row < rows)[None, :],
    )


def integer_product(x: Tensor, integers: Tensor, scales: Tensor, rows: int, bits: int) -> Tensor:
    """x W^T of at most `MOST_ROWS_ON_GPU` rows x (..., K) and W as `QuantizedMatrix` has it: (..., rows)."""
    columns, (_, groups, words, block, _) = x.shape[-1], integers.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    with torch.cuda.device_of(x):
        _integer_product[(triton.cdiv(rows, ROWS),)](
            x,
            integers.view(torch.int32),
            scales.contiguous(),
            y,
            x.numel() // columns,
            rows,
            columns,
            groups,
            BITS=bits,
            GROUP=words * 32 // bits,
            BLOCK=block,
            COUNT=MOST_ROWS_ON_GPU,
            ROWS=ROWS,
            WORDS=WORDS[x.itemsize],
            num_warps=2,
        )
    return y


@triton.jit
def _rotate(x, inside, cosine, sine):
    """Pairs of neighbours, the first numbers of which are at x, turned by their angles: (..., 2 pairs)."""
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + 1, mask=inside, other=0.0).to(tl.float32)
    return tl.interleave(a * cosine - b * sine, a * sine + b * cosine).to(x.dtype.element_ty)


@triton.jit
def _attend_split(
    q,
    k,
    v,
    cache_k,
    cache_v,
    angles,
    positions,
    slots,
    sums,
    masses,
    cache_row,
    cache_head,
    window,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attention of a row's queries of one key head to one of SPLITS parts of the positions: sums of values, of weights.

    The first part also writes the new key and value to the caches.
    """
    kv_heads = tl.num_programs(1)
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    dtype = q.dtype.element_ty
    position = tl.load(positions + row)
    pair, g, d = tl.arange(0, HALF), tl.arange(0, QUERIES), tl.arange(0, 2 * HALF)
    cosine = tl.load(angles + row * HEAD + 2 * pair, mask=pair < HEAD // 2, other=0.0)
    sine = tl.load(angles + row * HEAD + 2 * pair + 1, mask=pair < HEAD // 2, other=0.0)

    offset = (row * kv_heads + head) * HEAD
    inside = (g < GROUP)[:, None] & (pair < HEAD // 2)[None, :]
    queries = _rotate(
        q + offset * GROUP + g[:, None] * HEAD + 2 * pair[None, :], inside, cosine, sine
    )  # (QUERIES, 2 HALF)
    key = _rotate(k + offset + 2 * pair, pair < HEAD // 2, cosine, sine)  # (2 HALF)
    value = tl.load(v + offset + d, mask=d < HEAD, other=0.0)
    here = tl.load(slots + row).to(tl.int64) * cache_row + head * cache_head
    new = d < tl.where((position >= 0) & (split == 0), HEAD, 0)
    tl.store(cache_k + here + position * HEAD + d, key, mask=new)
    tl.store(cache_v + here + position * HEAD + d, value, mask=new)

    # The first part has the new key and value, which needn't be read. All parts share what was cached before.
    root = 1 / tl.sqrt(HEAD + 0.0)
    score = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * root  # (QUERIES)
    first = split == 0
    most = tl.where(first, score, -float("inf"))
    mass = tl.where(first, tl.exp(score - score), 0.0)  # 1, or NaN where the score is NaN
    total = tl.zeros((QUERIES, 2 * HALF), tl.float32) + tl.where(first, value.to(tl.float32), 0.0)[None, :]
    begin = tl.maximum(position - window + 1, 0)
    share = tl.cdiv(tl.maximum(position - begin, 0), SPLITS)
    begin = begin + split * share
    end = tl.minimum(begin + share, position)
    for start in range(begin, end, KEYS):
        s = start + tl.arange(0, KEYS)
        seen = (s < end)[:, None] & (d < HEAD)[None, :]
        keys = tl.load(cache_k + here + s[:, None] * HEAD + d[None, :], mask=seen, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * root  # (QUERIES, KEYS)
        scores = tl.where((s < end)[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.where(most == -float("inf"), 0.0, tl.exp(most - highest))
        weights = tl.exp(scores - highest[:, None])
        values = tl.load(cache_v + here + s[:, None] * HEAD + d[None, :], mask=seen, other=0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(dtype), values, total * shrink[:, None], input_precision="ieee")
        most = highest

    out = ((row * kv_heads + head) * GROUP + g) * SPLITS + split
    tl.store(masses + 2 * out, most, mask=g < GROUP)
    tl.store(masses + 2 * out + 1, mass, mask=g < GROUP)
    tl.store(sums + out[:, None] * HEAD + d[None, :], total, mask=(g < GROUP)[:, None] & (d < HEAD)[None, :])


@triton.jit
def _gather(sums, masses, out, HEAD: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The output of one query head of one row, from all its parts."""
    head = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    most = tl.load(masses + 2 * (head * SPLITS + split))
    mass = tl.load(masses + 2 * (head * SPLITS + split) + 1)
    shrink = tl.where(most == -float("inf"), 0.0, tl.exp(most - tl.max(most, 0)))
    parts = tl.load(sums + (head * SPLITS + split)[:, None] * HEAD + d[None, :], mask=(d < HEAD)[None, :], other=0.0)
    result = tl.sum(parts * shrink[:, None], 0) / tl.sum(mass * shrink, 0)
    tl.store(out + head * HEAD + d, result.to(out.dtype.element_ty), mask=d < HEAD)


def attention(
    xq: Tensor,
    xk: Tensor,
    xv: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    angles: Tensor,
    positions: Tensor,
    window: int,
    slots: Tensor | None = None,
) -> Tensor:
    """As `cpu.attention`, of one token a row. Positions are divided into parts, so that few rows keep the GPU busy."""
    bsz, _, heads, head_dim = xq.shape
    kv_heads = xk.shape[2]
    splits = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, bsz * kv_heads)), PROGRAMS // 4)
    sums = xq.new_empty(bsz, heads, splits, head_dim, dtype=torch.float32)
    masses = xq.new_empty(bsz, heads, splits, 2, dtype=torch.float32)
    out = torch.empty(xq.shape, dtype=xq.dtype, device=xq.device)
    angles = angles.expand(bsz, -1, -1)
    slots = torch.arange(bsz, device=xq.device) if slots is None else slots
    xq, xk, xv, angles, positions, slots = (x.contiguous() for x in (xq, xk, xv, angles, positions.long(), slots))
    group, half = heads // kv_heads, triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device_of(xq):
        _attend_split[(bsz, kv_heads, splits)](
            xq,
            xk,
            xv,
            cache_k,
            cache_v,
            angles,
            positions,
            slots,
            sums,
            masses,
            cache_k.stride(0),
            cache_k.stride(2),
            min(window, 1 << 30),
            GROUP=group,
            HEAD=head_dim,
            SPLITS=splits,
            QUERIES=max(triton.next_power_of_2(group), 16),
            HALF=max(half, 8),
            KEYS=KEYS[xq.itemsize],
        )
        _gather[(bsz * heads,)](sums, masses, out, HEAD=head_dim, SPLITS=splits, WIDTH=2 * half)
    return out
