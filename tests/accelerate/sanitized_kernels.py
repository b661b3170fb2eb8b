"""A program: compute with the kernels of a library that was built with sanitizers, of sizes near every bound.

    LD_PRELOAD=libasan.so python sanitized_kernels.py LIBRARY

Results are compared with torch's; a byte that is read or written out of place ends the program.
"""

import ctypes
import sys
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.accelerate.kernels import cpu
from llama.accelerate.kernels.scratch import MOST_SCRATCH, attention_scratch
from llama.accelerate.quantization import QuantizedMatrix

DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (16, 48, 64, 80, 128, 208, 256, 512, 1024)
HEADS = ((1, 1), (4, 2), (7, 1), (24, 3), (96, 1), (600, 1))


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(found: Tensor, expected: Tensor, what: str) -> None:
    bound = 2e-4 if found.dtype == torch.float32 else 4e-2
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-3)
    assert error < bound, f"{what}: {error:.1e}"


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(angles)[:, :, None]).flatten(3).to(x.dtype)


def check_attention(
    heads: int, kv_heads: int, dim: int, seqlen: int, start: int, window: int, dtype: torch.dtype
) -> None:
    end = start + seqlen
    q, k, v = (numbers(2, seqlen, n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    caches = [numbers(2, kv_heads, end, dim, dtype=dtype).transpose(1, 2) for _ in range(2)]
    turns = torch.randn(1, seqlen, dim // 2, generator=torch.Generator().manual_seed(2))
    angles = torch.view_as_real(torch.polar(torch.ones_like(turns), turns))
    keys, values = (cache.clone() for cache in caches)
    keys[:, start:], values[:, start:] = rotate(k, angles), v
    out = cpu.attention(q, k, v, *caches, angles.flatten(2), torch.tensor([start, start]), window)
    place = torch.arange(end)
    ahead = torch.arange(start, end)[:, None] - place
    mask = (ahead >= 0) & (ahead < window)
    grouped = [x.float().repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in (keys, values)]
    expected = F.scaled_dot_product_attention(rotate(q, angles).float().transpose(1, 2), *grouped, attn_mask=mask)
    check(out, expected.transpose(1, 2), f"attention of {heads} heads, {kv_heads}, {dim}, {seqlen} from {start}")
    assert torch.equal(caches[0], keys) or dtype == torch.bfloat16 or (caches[0] - keys).abs().max() < 1e-5


def check_products(rows: int, columns: int, count: int, dtype: torch.dtype) -> None:
    x, weight = numbers(count, columns, dtype=dtype), numbers(rows, columns, dtype=dtype)
    if columns * dtype.itemsize % cpu.WORD == 0:
        blocks = cpu.allocate_packed(weight)
        cpu.pack(weight, blocks)
        check(cpu.product(x, blocks, rows), F.linear(x.float(), weight.float()), f"product {rows} {columns} {count}")
    for bits in (8, 4):
        matrix = QuantizedMatrix(weight, bits)
        found = cpu.integer_product(x, matrix.integers, matrix.scales, rows, bits)
        assert found.isfinite().all()
    check(cpu.rms_norm(x, x[0], 1e-5), F.rms_norm(x.float(), (columns,), x[0].float(), 1e-5), f"norm {columns}")
    check(cpu.swiglu(x, x), F.silu(x.float()) * x.float(), f"swiglu {columns}")


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    cpu.library = lambda: library
    done = 0
    for (heads, kv_heads), dim, dtype in product(HEADS, HEAD_DIMS, DTYPES):
        if attention_scratch(heads, kv_heads, dim, dtype.itemsize) > MOST_SCRATCH:
            try:
                check_attention(heads, kv_heads, dim, 2, 0, 9, dtype)
            except RuntimeError:
                continue
            raise AssertionError(f"{heads} heads of {dim} were not refused")
        for seqlen, start, window in ((1, 0, 99), (1, 70, 20), (3, 130, 7), (67, 5, 1 << 60)):
            check_attention(heads, kv_heads, dim, seqlen, start, window, dtype)
            done += 1
    for rows, columns, count, dtype in product((1, 63, 130), (1, 2, 31, 64, 200), (1, 5, 13), DTYPES):
        check_products(rows, columns, count, dtype)
        done += 1
    print(done, "calls")


if __name__ == "__main__":
    main()
