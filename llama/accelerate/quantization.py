"""A packed matrix: in the model's own numbers, or quantized to integers of 8 or 4 bits in groups that share a scale.

Knows matrices; knows no layers. kernels/csrc/vectors.h says what lies where in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import cpu, dispatch
from .kernels.cpu import BLOCK
from .memory_pages import in_large_pages, mapped_ranges, release

Quantization = Literal["int8", "int4"]
BITS: dict[Quantization, int] = {"int8": 8, "int4": 4}
GROUP = {8: 64, 4: 32}  # numbers of a row that share a scale, as in csrc/integers.c
SLAB = 1 << 22  # bytes of a matrix that are packed at a time, so that what is made of them stays in the cache
# What a group's number of the largest size becomes. 4 bits have several candidates, of which the best is tried out.
LARGEST = {8: (-127.0,), 4: (-8.0, -7.5, -7.0, 7.5)}


def bits_of(quantization: Quantization | None) -> float | None:
    """Bits of a number in a matrix, with its share of the group's scale. None: as many as its dtype has."""
    return None if quantization is None else BITS[quantization] + 16 / GROUP[BITS[quantization]]


@dataclass(frozen=True)
class QuantizedRows:
    """W (N, K) quantized, row by row: number = (integer - zero) * scale, where zero is the middle of their range."""

    words: Tensor  # int32 (N, K * bits / 32): 4 integers of 8 bits or 8 of 4 each, the first in the lowest bits
    scales: Tensor  # bfloat16 (N, groups); where K isn't whole groups, the last group ends in zeros


class PackedMatrix(ABC):
    """W (rows, K)."""

    rows: int
    shape: torch.Size
    nbytes: int

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T of x (..., K): (..., rows)."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """W, or the numbers that its integers stand for."""

    @abstractmethod
    def lookup(self, rows: Tensor) -> Tensor:
        """Those rows of W: (...) -> (..., K)."""

    @abstractmethod
    def holds(self, weight: Tensor) -> bool:
        """Whether `unpack` would give `weight`, bit for bit."""


class FloatMatrix(PackedMatrix):
    """The matrix as it is, bit for bit."""

    def __init__(self, weight: Tensor, from_file: bool = False):
        """from_file: `weight` may lie in a mapped file, whose pages are released."""
        self.rows = len(weight)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.packed = cpu.allocate_packed(weight)
        self.nbytes = self.packed.nbytes
        for start, piece in slabs(weight, from_file):
            cpu.pack(piece, self.packed[start // BLOCK :])

    def product(self, x: Tensor) -> Tensor:
        return dispatch.product(x, self.packed, self.rows)

    def unpack(self) -> Tensor:
        return cpu.unpack(self.packed, self.rows)

    def lookup(self, rows: Tensor) -> Tensor:
        return cpu.lookup(self.packed, rows)

    def holds(self, weight: Tensor) -> bool:
        if (weight.shape, weight.dtype, weight.device) != (self.shape, self.dtype, self.packed.device):
            return False
        for start, piece in slabs(weight):
            packed = cpu.allocate_packed(piece)
            cpu.pack(piece, packed)
            if not torch.equal(
                packed.view(torch.int32), self.packed[start // BLOCK :][: len(packed)].view(torch.int32)
            ):
                return False
        return True


class QuantizedMatrix(PackedMatrix):
    """The matrix quantized: the words and scales of `QuantizedRows`, in blocks of rows."""

    def __init__(
        self, weight: Tensor | QuantizedRows, bits: int, dtype: torch.dtype | None = None, from_file: bool = False
    ):
        """weight: W (N, K), or its quantized rows; then dtype is that of the numbers to compute with.

        from_file: `weight` may lie in a mapped file, whose pages are released.
        """
        rows = weight if isinstance(weight, Tensor) else weight.words
        self.bits, self.dtype = bits, dtype or rows.dtype
        self.rows, self.columns = len(rows), rows.shape[1] * (1 if rows is weight else 32 // bits)
        self.shape = torch.Size((self.rows, self.columns))
        self.fast = dispatch.is_available(rows.new_empty(0, dtype=self.dtype))
        blocks, groups = -(-self.rows // BLOCK), -(-self.columns // GROUP[bits])
        words = (blocks, groups, GROUP[bits] * bits // 32, BLOCK, 4)
        self._native = self.fast and rows.device.type == "cpu"  # else kernels are Triton's, which only multiply
        # uint8 (N / 64, groups, words, 64, 4): the bytes of the words; bfloat16 (N / 64, groups, 64)
        self.integers = in_large_pages(words, torch.uint8) if self._native else rows.new_empty(words, dtype=torch.uint8)
        self.scales = rows.new_empty(blocks, groups, BLOCK, dtype=torch.bfloat16)
        self.nbytes = self.integers.nbytes + self.scales.nbytes
        if isinstance(weight, QuantizedRows):
            self._fill(0, weight, from_file)
        else:
            self._quantize(weight, from_file)

    def _quantize(self, weight: Tensor, from_file: bool) -> None:
        for start, piece in slabs(weight, from_file):
            if self._native:
                first = start // BLOCK
                cpu.quantize(piece, self.integers[first:], self.scales[first:], self.bits)
            else:
                self._fill(start, quantize_rows(piece, self.bits))

    def _fill(self, first: int, rows: QuantizedRows, from_file: bool = False) -> None:
        """Write the rows to their places, from the row `first` on, which begins a block."""
        words = self.integers.view(torch.int32).flatten(1, 2).squeeze(-1)  # (N / 64, groups * words, 64)
        for blocks, source in ((words, rows.words), (self.scales, rows.scales)):
            for start, piece in slabs(source, from_file):
                columns = F.pad(piece, (0, 0, 0, -len(piece) % BLOCK)).unflatten(0, (-1, BLOCK)).mT
                blocks[(first + start) // BLOCK :][: len(columns)] = columns

    def by_rows(self) -> QuantizedRows:
        """The words and scales, row by row."""
        words = self.integers.view(torch.int32).flatten(1, 2).squeeze(-1)
        return QuantizedRows(*(x.mT.flatten(0, 1)[: self.rows] for x in (words, self.scales)))

    def product(self, x: Tensor) -> Tensor:
        many = x.device.type == "cuda" and x.numel() > dispatch.MOST_ROWS_ON_GPU * self.columns
        if many or not self.fast:
            return F.linear(x, self.unpack())
        return dispatch.integer_product(x, self.integers, self.scales, self.rows, self.bits)

    def unpack(self) -> Tensor:
        rows = (x.flatten(0, 1)[: self.rows] for x in (self.integers.permute(0, 3, 1, 2, 4), self.scales.mT))
        return self._numbers(*rows)

    def lookup(self, rows: Tensor) -> Tensor:
        block, row = rows // BLOCK, rows % BLOCK
        return self._numbers(self.integers[block, :, :, row], self.scales[block, :, row])

    def holds(self, weight: Tensor) -> bool:
        if (weight.shape, weight.dtype, weight.device) != (self.shape, self.dtype, self.scales.device):
            return False
        rows = torch.arange(self.rows, device=weight.device)
        for start, piece in slabs(weight):
            numbers = self.lookup(rows[start : start + len(piece)])
            if not torch.equal(numbers.view(torch.uint8), piece.contiguous().view(torch.uint8)):
                return False
        return True

    def _numbers(self, integers: Tensor, scales: Tensor) -> Tensor:
        """integers: (..., groups, words, 4); scales: (..., groups) -> (..., K)."""
        if self.bits == 4:
            integers = torch.stack([integers & 15, integers >> 4], dim=-1)  # (..., groups, words, 4, 2)
        numbers = integers.flatten(scales.ndim).float() - (1 << self.bits - 1)  # (..., groups, group)
        return (numbers * scales[..., None].float()).flatten(-2)[..., : self.columns].to(self.dtype)


def slabs(weight: Tensor, from_file: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Pieces of whole blocks and where they start. from_file: of a mapped file, keep only one piece in memory."""
    step = max(SLAB // weight[0].nbytes // BLOCK, 1) * BLOCK
    ranges = mapped_ranges() if from_file else []
    for start in range(0, len(weight), step):
        piece = weight[start : start + step]
        yield start, piece
        release(piece, ranges)


def quantize_rows(weight: Tensor, bits: int) -> QuantizedRows:
    """W (N, K) quantized, its last group filled up with zeros: as integers.c does it, in torch's operations.

    Of the scales that make a group's largest number one of `LARGEST`, the one with the least squared error is taken;
    where no error is finite the scale is NaN, which then shows in the logits.
    """
    group, half = GROUP[bits], 1 << bits - 1
    numbers = F.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))  # (N, groups, group)
    largest = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True))  # (N, groups, 1), with their signs
    best = torch.full_like(largest, torch.inf)
    integers, scales = torch.zeros_like(numbers), torch.full_like(largest, torch.nan)
    for target in LARGEST[bits]:
        scale = (largest / target).bfloat16().float()
        tried = (numbers / scale.where(scale != 0, 1)).round_().clamp_(-half, half - 1)
        error = sum_by_halves((tried * scale - numbers).square_())
        better = error < best
        integers, scales, best = (
            torch.where(better, new, old) for new, old in ((tried, integers), (scale, scales), (error, best))
        )
    whole = (integers + half).to(torch.uint8).flatten(1)  # (N, K)
    whole = whole if bits == 8 else whole[:, ::2] | whole[:, 1::2] << 4
    return QuantizedRows(whole.contiguous().view(torch.int32), scales.squeeze(-1).bfloat16())


def sum_by_halves(x: Tensor) -> Tensor:
    """The sum over the last dimension, which stays, in an order that every processor can keep."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x
