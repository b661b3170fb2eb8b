"""Decode steps that are captured once and then replayed, on a GPU as CUDA graphs: nothing waits for Python.

Knows steps, not what they compute. A replay reads and writes the memory that the capture did.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .._util.slots import Slots
from ..model import Attention
from .call_capture import Capture, CaptureFunction

# The position of rows that only fill up a batch. Kernels skip such a row; as an index, -1 is the last position.
NO_TOKEN = -1


class CapturedSteps:
    """A step, captured when a size of batch is there for the first time, and replayed from then on.

    Rows at `NO_TOKEN` fill a batch up to that size.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Tensor, int | None, Slots | None], Tensor],
        capture: CaptureFunction,
        attentions: Sequence[Attention],
        like: Tensor,
        max_batch_size: int,
        masked: bool,
    ):
        """like: of the dtype and device of the KV caches. masked: whether attention sees rows at NO_TOKEN, which then
        write to the last position of the caches.
        """
        # By size, positions seen, threads, and the generation of the engine's slots; None: of calls by hand.
        self.captures: dict[tuple[int, int | None, int, int | None], Capture] = {}
        self._step, self._capture = step, capture
        self._attentions, self._like, self._masked, self._most = attentions, like, masked, max_batch_size
        self._caches: list[int] = []  # ids of the KV caches that the captures were made on
        self._inputs: list[Tensor] = []  # tokens, positions, angles and slots of max_batch_size rows

    def __call__(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None, slots: Slots | None
    ) -> Tensor:
        bsz = len(tokens)
        size = min(padded_size(bsz), self._most)
        key = size, end, torch.get_num_threads(), None if slots is None else slots.cache.generation
        with torch.inference_mode(False), torch.no_grad():  # what is kept is usable in and out of it
            if not self._inputs:
                own_inputs = (tokens.long(), positions, angles, positions)
                self._inputs = [x.new_zeros(self._most, *x.shape[1:]) for x in own_inputs]
            for own, given in zip(self._inputs, (tokens, positions, angles), strict=False):
                own[:bsz].copy_(given)
            self._inputs[1][bsz:size].fill_(NO_TOKEN)
            if slots is not None:
                self._inputs[3][:bsz].copy_(slots.rows)
            if key in self.captures:
                self.captures[key].replay()
            else:
                self.captures[key] = self._capture_step(size, end, slots)
        return self.captures[key].output[:bsz].clone()

    def _capture_step(self, size: int, end: int | None, slots: Slots | None) -> Capture:
        """Capture a step on the memory that stays: that of the inputs, and of the caches by hand or of the slots."""
        tokens, positions, angles, rows = (x[:size] for x in self._inputs)
        if slots is None:
            self._make_caches()
            return self._capture(partial(self._step, tokens, positions, angles, end, None))
        earlier = [key for key in self.captures if key[3] not in (None, slots.cache.generation)]
        for key in earlier:
            del self.captures[key]
        for attention in self._attentions:
            slots.cache.caches(attention, self._like)  # so that no capture makes them
        return self._capture(partial(self._step, tokens, positions, angles, end, Slots(slots.cache, rows, None)))

    def forget_other_caches(self) -> None:
        """Forget the captures of calls by hand unless they were made on the KV caches that the model has now."""
        if [id(cache) for a in self._attentions for cache in (a.cache_k, a.cache_v)] != self._caches:
            self.captures = {key: capture for key, capture in self.captures.items() if key[3] is not None}

    def _make_caches(self) -> None:
        """Make the KV caches, so that no capture does; where attention is masked, one position longer, for NO_TOKEN."""
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
