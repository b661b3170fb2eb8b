"""The KV cache: where a pass stands in it, what its queries see, how keys and values are written.

A layer's caches are (slots, S, KV, D) each, in memory (slots, KV, S, D). Calls by hand have their own, in which row b
uses slot b. The engine names the slot of each row. Knows no layer, no text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._util.slots import Slots
from .errors import LlamaError

StartPos = int | Tensor  # the position of a row's first token: one for all rows, or (B,) of them


def first_and_last(start_pos: StartPos, bsz: int) -> tuple[int, int]:
    """The smallest and the largest start position. Raises LlamaError unless there is one for all rows, or one a row."""
    if isinstance(start_pos, int):
        return start_pos, start_pos
    if not isinstance(start_pos, Tensor) or start_pos.is_floating_point() or start_pos.shape != (bsz,):
        raise LlamaError(f"start_pos is {start_pos!r}, expected an int, or a tensor of one for each of {bsz} rows")
    first, last = torch.stack(start_pos.aminmax()).tolist()
    return first, last


def attention_mask(positions: Tensor, end: int, window: int | None = None) -> Tensor:
    """Which of the first `end` positions each query sees: its own and those before it, with a window the last `window`.

    positions: of the queries, (T) or (B, T). Returns bool (1 or B, 1, T, end).
    """
    keys = torch.arange(end, device=positions.device)  # (S)
    queries = positions[..., None]  # (T, 1) or (B, T, 1)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return mask.view(-1, 1, *mask.shape[-2:])


@dataclass(frozen=True)
class Pass:
    """One forward pass: its tokens, and where they stand."""

    tokens: Tensor  # integers (B, T)
    start_pos: StartPos | None  # None: no cache
    positions: Tensor  # (T) or (B, T)
    first: int  # the smallest start position of a row
    last: int  # the largest
    freqs_cis: Tensor  # angles at the positions, complex64 (T, D/2) or (B, T, D/2)
    slots: Slots | None  # of the engine's; None: those of calls by hand

    def mask(self, window: int | None = None) -> Tensor | None:
        """What the queries see, as `Attention.forward` takes it: bool (1 or B, 1, T, S), or None."""
        end = self.last + self.positions.shape[-1]
        if window is not None and end > window:
            return attention_mask(self.positions, end, window)
        if self.first < self.last or (self.first > 0 and self.positions.shape[-1] > 1):
            return attention_mask(self.positions, end)
        return None


def update(
    cache_k: Tensor,
    cache_v: Tensor,
    xk: Tensor,
    xv: Tensor,
    start_pos: StartPos,
    end: int,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write xk and xv (B, T, KV, D) at their rows' positions; returns the first `end` positions, (B, S, KV, D) each.

    slots: where in the caches the rows are, (B); None: row b at b, and what is returned is a view.
    """
    bsz, seqlen = xk.shape[:2]
    rows: Tensor | slice = slice(bsz) if slots is None else slots
    if isinstance(start_pos, int):
        cache_k[rows, start_pos : start_pos + seqlen] = xk
        cache_v[rows, start_pos : start_pos + seqlen] = xv
    else:
        places = (torch.arange(bsz, device=xk.device) if slots is None else slots)[:, None]  # (B, 1)
        columns = start_pos[:, None] + torch.arange(seqlen, device=xk.device)  # (B, T)
        cache_k[places, columns] = xk
        cache_v[places, columns] = xv
    return cache_k[rows, :end], cache_v[rows, :end]
