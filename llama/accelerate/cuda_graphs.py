"""Decode steps that are captured once and then replayed, on a GPU as CUDA graphs: nothing waits for Python.

Knows steps, not what they compute. A replay reads and writes the memory that the capture did.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..model import Attention
from .call_capture import Capture, CaptureFunction

NO_TOKEN = -1  # the position of rows that only fill up a batch: kernels leave it out, and to index it is the last one


class CapturedSteps:
    """A step, captured when a size of batch is there for the first time, and replayed from then on.

    Rows at `NO_TOKEN` fill a batch up to that size.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Tensor, int | None], Tensor],
        capture: CaptureFunction,
        attentions: Sequence[Attention],
        like: Tensor,
        max_batch_size: int,
        masked: bool,
    ):
        """like: of the dtype and device of the KV caches. masked: whether a row may write a position it hasn't."""
        self.captures: dict[tuple[int, int | None, int], Capture] = {}  # by size, positions seen, and threads
        self._step, self._capture = step, capture
        self._attentions, self._like, self._masked, self._most = attentions, like, masked, max_batch_size
        self._caches: list[int] = []  # which they are that the captures were made on
        self._inputs: list[Tensor] = []  # tokens, positions and angles of max_batch_size rows

    def __call__(self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None) -> Tensor:
        bsz = len(tokens)
        size = min(padded_size(bsz), self._most)
        key = size, end, torch.get_num_threads()
        with torch.inference_mode(False), torch.no_grad():  # what is kept is usable in and out of it
            if not self._inputs:
                self._inputs = [x.new_zeros(self._most, *x.shape[1:]) for x in (tokens.long(), positions, angles)]
            for own, given in zip(self._inputs, (tokens, positions, angles), strict=True):
                own[:bsz].copy_(given)
            self._inputs[1][bsz:size].fill_(NO_TOKEN)
            if key in self.captures:
                self.captures[key].replay()
            else:
                self._make_caches()
                tokens, positions, angles = (x[:size] for x in self._inputs)  # which stay where they are
                self.captures[key] = self._capture(partial(self._step, tokens, positions, angles, end))
        return self.captures[key].output[:bsz].clone()

    def forget_other_caches(self) -> None:
        """Forget the captures if the KV caches are others than those they were made on."""
        if [id(cache) for a in self._attentions for cache in (a.cache_k, a.cache_v)] != self._caches:
            self.captures.clear()

    def _make_caches(self) -> None:
        """Make the KV caches, so that no capture does; where attention is masked, with a last position of no row."""
        for attention in self._attentions:
            caches = attention.caches(self._like)
            rows, heads, length, size = attention.cache_shape
            if self._masked and caches[0].shape[1] == length:
                for name, cache in zip(("cache_k", "cache_v"), caches, strict=True):
                    longer = cache.new_zeros(rows, heads, length + 1, size).transpose(1, 2)
                    longer[:, :length] = cache
                    setattr(attention, name, longer)
        self._caches = [id(cache) for a in self._attentions for cache in (a.cache_k, a.cache_v)]


def padded_size(bsz: int) -> int:
    """The rows of a capture for so many: powers of two up to 8, then multiples of 8."""
    return 1 << (bsz - 1).bit_length() if bsz <= 8 else -(-bsz // 8) * 8
