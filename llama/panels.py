"""A packed matrix: in the model's own numbers, or rounded to integers of 8 or 4 bits in groups that share a scale.

Knows matrices; knows no layers. What lies where in memory is said in kernels.c.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import PANEL
from .mapped import let_go, mapped_ranges

Quantization = Literal["int8", "int4"]
BITS = {"int8": 8, "int4": 4}
GROUP = {8: 64, 4: 32}  # numbers of a row that share a scale, as in kernels.c
SLAB = 1 << 22  # bytes of a matrix that are packed at a time: what is made of them stays in the cache
# What a group's number of the largest size becomes, of those that 4 bits have: the best is found by trying.
LARGEST = {8: (-127.0,), 4: (-8.0, -7.5, -7.0, 7.5)}


def bits_of(quantization: Quantization | None) -> float | None:
    """Of a number in a matrix, with its share of the group's scale; None: as many as its dtype has."""
    return None if quantization is None else BITS[quantization] + 16 / GROUP[BITS[quantization]]


class Panels(nn.Module):
    """W (rows, K). Its state isn't saved: whose matrix it is saves that."""

    rows: int

    def product(self, x: Tensor) -> Tensor:
        """x W^T of x (..., K): (..., rows)."""
        raise NotImplementedError

    def unpacked(self) -> Tensor:
        """W, or what it was rounded to."""
        raise NotImplementedError

    def lookup(self, rows: Tensor) -> Tensor:
        """Those rows of W: (...) -> (..., K)."""
        raise NotImplementedError

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
    """The matrix rounded: number = (integer - zero) * scale, where zero is the middle of what the integer can be.

    integers: uint8 (N / 64, groups, words, 64, 4), where a word has 4 bytes of a row, of 4 bits each 8 numbers, the
    second four in the high halves. scales: bfloat16 (N / 64, groups, 64).
    """

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.rows, self.columns = weight.shape
        self.bits, self.dtype, self.fast = bits, weight.dtype, kernels.available(weight)
        group = GROUP[bits]
        panels, groups = -(-self.rows // PANEL), -(-self.columns // group)
        integers = weight.new_empty(panels, groups, group * bits // 32, PANEL, 4, dtype=torch.uint8)
        scales = weight.new_empty(panels, groups, PANEL, dtype=torch.bfloat16)
        for start, piece in slabs(weight):
            here = slice(start // PANEL, start // PANEL + -(-len(piece) // PANEL))
            integers[here], scales[here] = side_by_side(*rounded(piece, bits), bits)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        if not self.fast:
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
            integers = torch.stack([integers & 15, integers >> 4], dim=-2)  # (..., groups, words, 2, 4)
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


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers, uint8 (N, groups, group), and their scales, bfloat16 (N, groups), of W (N, K) with zeros at its end.

    Of the scales that make a group's largest number one of `LARGEST`, the one with the least squared error is taken.
    """
    group, half = GROUP[bits], 1 << bits - 1
    numbers = F.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))  # (N, groups, group)
    largest = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True))  # (N, groups, 1), with their signs
    best = torch.full_like(largest, torch.inf)
    integers, scales = torch.zeros_like(numbers), torch.zeros_like(largest)
    for target in LARGEST[bits]:
        scale = (largest / target).bfloat16().float()
        tried = (numbers / scale.where(scale != 0, 1)).round_().clamp_(-half, half - 1)
        error = (tried * scale - numbers).square_().sum(-1, keepdim=True)
        better = error < best
        integers, scales, best = (
            torch.where(better, *pair) for pair in ((tried, integers), (scale, scales), (error, best))
        )
    scales = scales.where(largest.isfinite(), torch.nan)  # to be seen in the logits
    return (integers + half).to(torch.uint8), scales.squeeze(-1).bfloat16()


def side_by_side(integers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of `rounded`'s, rows of integers to panels, (N / 64, groups, words, 64, 4), and scales, (N / 64, groups, 64)."""
    if bits == 4:
        low, high = integers.unflatten(-1, (-1, 2, 4)).unbind(-2)  # (N, groups, words, 4) each
        integers = low | high << 4
    words = integers.contiguous().view(torch.int32).flatten(2)  # (N, groups, words)
    words, scales = (F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % PANEL)) for x in (words, scales))
    panels = words.unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1).contiguous()  # (N / 64, groups, words, 64)
    return panels[..., None].view(torch.uint8), scales.unflatten(0, (-1, PANEL)).mT
