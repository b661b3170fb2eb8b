"""A packed matrix: in the model's own numbers, or rounded to integers of 8 or 4 bits in groups that share a scale.

Knows matrices; knows no layers. What lies where in memory is said in native/vectors.h.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import dispatch as kernels
from .kernels.dispatch import PANEL
from .memory_pages import in_large_pages, let_go, mapped_ranges

Quantization = Literal["int8", "int4"]
BITS: dict[Quantization, int] = {"int8": 8, "int4": 4}
GROUP = {8: 64, 4: 32}  # numbers of a row that share a scale, as in native/integers.c
SLAB = 1 << 22  # bytes of a matrix that are packed at a time: what is made of them stays in the cache
# What a group's number of the largest size becomes, of those that 4 bits have: the best is found by trying.
LARGEST = {8: (-127.0,), 4: (-8.0, -7.5, -7.0, 7.5)}


def bits_of(quantization: Quantization | None) -> float | None:
    """Of a number in a matrix, with its share of the group's scale; None: as many as its dtype has."""
    return None if quantization is None else BITS[quantization] + 16 / GROUP[BITS[quantization]]


@dataclass(frozen=True)
class Rounded:
    """W (N, K) rounded, row by row: number = (integer - zero) * scale, where zero is the middle of their range.

    words: int32 (N, K * bits / 32), each of 4 integers of 8 bits or 8 of 4, the first in the lowest bits. scales:
    bfloat16 (N, groups). Where K isn't whole groups, the last one ends in zeros.
    """

    words: Tensor
    scales: Tensor


class Panels(nn.Module, ABC):
    """W (rows, K). Its state isn't saved: whose matrix it is saves that."""

    rows: int

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T of x (..., K): (..., rows)."""

    @abstractmethod
    def unpacked(self) -> Tensor:
        """W, or what it was rounded to."""

    @abstractmethod
    def lookup(self, rows: Tensor) -> Tensor:
        """Those rows of W: (...) -> (..., K)."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: object) -> None:
        pass


class FloatPanels(Panels):
    """The matrix as it is, bit for bit."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.rows = len(weight)
        panels = kernels.new_panels(weight)
        for start, piece in slabs(weight):
            kernels.pack(piece, panels[start // PANEL :])
        self.panels = nn.Parameter(panels, requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        return kernels.product(x, self.panels, self.rows)

    def unpacked(self) -> Tensor:
        return kernels.unpack(self.panels, self.rows)

    def lookup(self, rows: Tensor) -> Tensor:
        return kernels.lookup(self.panels, rows)


class IntegerPanels(Panels):
    """The matrix rounded: the words and scales of `Rounded`, side by side.

    integers: uint8 (N / 64, groups, words, 64, 4), the bytes of the words. scales: bfloat16 (N / 64, groups, 64).
    """

    def __init__(self, weight: Tensor | Rounded, bits: int, dtype: torch.dtype | None = None):
        """weight: W (N, K), or what it was rounded to: then dtype is that of the numbers that are computed with."""
        super().__init__()
        rows = weight if isinstance(weight, Tensor) else weight.words
        self.bits, self.dtype = bits, dtype or rows.dtype
        self.rows, self.columns = len(rows), rows.shape[1] * (1 if rows is weight else 32 // bits)
        self.fast = kernels.available(rows.new_empty(0, dtype=self.dtype))
        panels, groups = -(-self.rows // PANEL), -(-self.columns // GROUP[bits])
        words = (panels, groups, GROUP[bits] * bits // 32, PANEL, 4)
        self._native = self.fast and rows.device.type == "cpu"  # else kernels are Triton's, which only multiply
        new = in_large_pages(words, torch.uint8) if self._native else rows.new_empty(words, dtype=torch.uint8)
        self.integers = nn.Parameter(new, requires_grad=False)
        self.scales = nn.Parameter(rows.new_empty(panels, groups, PANEL, dtype=torch.bfloat16), requires_grad=False)
        if isinstance(weight, Rounded):
            self._fill(0, weight)
        else:
            self._round(weight)

    def _round(self, weight: Tensor) -> None:
        for start, piece in slabs(weight):
            if self._native:
                first = start // PANEL
                kernels.round_to_integers(piece, self.integers[first:], self.scales[first:], self.bits)
            else:
                self._fill(start, rounded(piece, self.bits))

    def _fill(self, first: int, rows: Rounded) -> None:
        """Put the rows in their places, from the row `first` on, which begins a panel."""
        words = self.integers.view(torch.int32).flatten(1, 2).squeeze(-1)  # (N / 64, groups * words, 64)
        for panels, source in ((words, rows.words), (self.scales, rows.scales)):
            for start, piece in slabs(source):
                beside = F.pad(piece, (0, 0, 0, -len(piece) % PANEL)).unflatten(0, (-1, PANEL)).mT
                panels[(first + start) // PANEL :][: len(beside)] = beside

    def by_rows(self) -> Rounded:
        """The words and scales as they were before they stood side by side."""
        words = self.integers.view(torch.int32).flatten(1, 2).squeeze(-1)
        return Rounded(*(x.mT.flatten(0, 1)[: self.rows] for x in (words, self.scales)))

    def product(self, x: Tensor) -> Tensor:
        many = x.device.type == "cuda" and x.numel() > kernels.MOST_ROWS_ON_GPU * self.columns
        if many or not self.fast:
            return F.linear(x, self.unpacked())
        return kernels.integer_product(x, self.integers, self.scales, self.rows, self.bits)

    def unpacked(self) -> Tensor:
        rows = (x.flatten(0, 1)[: self.rows] for x in (self.integers.permute(0, 3, 1, 2, 4), self.scales.mT))
        return self._numbers(*rows)

    def lookup(self, rows: Tensor) -> Tensor:
        panel, row = rows // PANEL, rows % PANEL
        return self._numbers(self.integers[panel, :, :, row], self.scales[panel, :, row])

    def _numbers(self, integers: Tensor, scales: Tensor) -> Tensor:
        """integers: (..., groups, words, 4); scales: (..., groups) -> (..., K)."""
        if self.bits == 4:
            integers = torch.stack([integers & 15, integers >> 4], dim=-1)  # (..., groups, words, 4, 2)
        numbers = integers.flatten(scales.ndim).float() - (1 << self.bits - 1)  # (..., groups, group)
        return (numbers * scales[..., None].float()).flatten(-2)[..., : self.columns].to(self.dtype)


def slabs(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of whole panels and where they start, of which only one is held in memory where the matrix is a file."""
    step = max(SLAB // weight[0].nbytes // PANEL, 1) * PANEL
    ranges = mapped_ranges()
    for start in range(0, len(weight), step):
        piece = weight[start : start + step]
        yield start, piece
        let_go(piece, ranges)


def rounded(weight: Tensor, bits: int) -> Rounded:
    """W (N, K) rounded, its last group filled up with zeros: what integers.c does, in torch's operations, bit for bit.

    Of the scales that make a group's largest number one of `LARGEST`, the one with the least squared error is taken;
    where no error is finite it is NaN, to be seen in the logits.
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
    return Rounded(whole.contiguous().view(torch.int32), scales.squeeze(-1).bfloat16())


def sum_by_halves(x: Tensor) -> Tensor:
    """Of the last dimension, which stays, in an order that every processor can keep."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x
