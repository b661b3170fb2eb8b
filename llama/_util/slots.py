"""The slots of the KV cache that the engine uses, beside the caches of calls by hand: their memory, and who is in them.

Knows tensors, and which layer a cache is of; knows no network, no token and no text.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import LlamaError
from .slot_memory import SlotMemory

Layers = dict[int, tuple[SlotMemory, SlotMemory]]  # keys and values, by the id of a layer's Attention


class KVCache:
    """The engine's slots in all layers of a model. Unwritten they take no memory on a CPU. A copied model has none."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held by whoever runs the model
        self.n_slots = 0
        self.generation = 0  # changes with the memory
        self._ends: list[int] = []  # of the rows of calls by hand: the furthest position that was written
        self.owner: object = None  # whose slots they are
        # Of each owner: number, dtype and device of its slots, their generation, and the memory of each layer.
        self._held: WeakKeyDictionary[Any, tuple[object, int, Layers]] = WeakKeyDictionary()
        self._generations = 0
        self._layers: Layers = {}

    @property
    def by_hand(self) -> int:
        """Tokens that the caches of calls by hand hold."""
        return sum(self._ends)

    def note_by_hand(self, bsz: int, end: int) -> None:
        """A call by hand writes so many rows up to position `end`."""
        self._ends += [0] * (bsz - len(self._ends))
        for row in range(bsz):
            self._ends[row] = max(self._ends[row], end)

    def claim(self, owner: object, n_slots: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Make the slots those of an owner. Returns whether they hold nothing that it wrote, since they are new."""
        form = n_slots, dtype, device
        held = self._held.get(owner)
        is_new = held is None or held[0] != form
        if is_new or held is None:
            self._generations += 1
            self._held[owner] = held = form, self._generations, {}
        self.owner, self.n_slots = owner, n_slots
        _, self.generation, self._layers = held
        return is_new

    def caches(self, attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, (slots, S + 1, KV, D) each; captured steps have their padding at the end."""
        memories = self._layers.get(id(attention))
        if memories is None:
            _, heads, length, size = attention.cache_shape
            shape = self.n_slots, heads, length + 1, size
            memories = SlotMemory(shape, like.dtype, like.device), SlotMemory(shape, like.dtype, like.device)
            self._layers[id(attention)] = memories
        return memories[0].tensor.transpose(1, 2), memories[1].tensor.transpose(1, 2)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another, in every layer."""
        for memory in self._memories():
            memory.tensor[target, :, :length] = memory.tensor[source, :, :length]

    def release(self, slot: int, start: int = 0) -> None:
        """Give back the memory of a slot from position `start` on, in every layer."""
        for memory in self._memories():
            for head in memory.tensor[slot]:  # (S, D)
                memory.release(head[start:])

    def _memories(self) -> Iterable[SlotMemory]:
        return [memory for memories in self._layers.values() for memory in memories]

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        return KVCache()

    def __reduce__(self) -> Any:
        return KVCache, ()


@dataclass(frozen=True)
class Slots:
    """The slots of a pass's rows."""

    cache: KVCache
    rows: Tensor  # (B), on the model's device
    first: int | None  # where they are neighbours in their order: the first, so that they are a view

    def caches(self, attention: Any, like: Tensor) -> "Caches":
        """A layer's caches of keys and values, and where in them the rows are; None: row b at b."""
        keys, values = self.cache.caches(attention, like)
        if self.first is None:
            return keys, values, self.rows
        view = slice(self.first, self.first + len(self.rows))
        return keys[view], values[view], None


PASS_SLOTS: ContextVar[Slots | None] = ContextVar("slots of the pass that runs", default=None)
# The slots of a pass whose caller can't be given them, since the model's forward may be a user's.
UNTOLD_SLOTS: ContextVar[Tensor | None] = ContextVar("slots that a forward isn't told", default=None)
Caches = tuple[Tensor, Tensor, Tensor | None]  # as `Slots.caches` gives them


@contextlib.contextmanager
def in_slots(slots: Slots | None) -> Iterator[None]:
    """The layers that are called in this context use these slots; None: their caches of calls by hand."""
    before = PASS_SLOTS.set(slots)
    try:
        yield
    finally:
        PASS_SLOTS.reset(before)


def find_caches(attention: Any, like: Tensor) -> Caches:
    """The caches that a layer uses in the pass that runs."""
    slots = PASS_SLOTS.get()
    return (*attention.caches(like), None) if slots is None else slots.caches(attention, like)


def place_rows(cache: KVCache, slots: Tensor | None, bsz: int, end: int | None, device: torch.device) -> Slots | None:
    """The slots of a pass with so many rows; None for calls by hand. Raises LlamaError for slots that there aren't.

    end: the position after the last one that the pass writes; None: it writes none.
    """
    is_cached = end is not None
    slots = UNTOLD_SLOTS.get() if slots is None and is_cached else slots
    if slots is None:
        cache.note_by_hand(bsz, end or 0)
        return None
    if not is_cached:
        raise LlamaError("slots were given without start_pos, and nothing is cached then: give both, or neither")
    if not isinstance(slots, Tensor) or slots.is_floating_point() or slots.shape != (bsz,):
        raise LlamaError(f"slots is {slots!r}, expected a tensor of one for each of {bsz} rows")
    numbers = slots.tolist()
    if min(numbers) < 0 or max(numbers) >= cache.n_slots or len(set(numbers)) < bsz:
        raise LlamaError(f"slots are {numbers}, expected different ones of the {cache.n_slots} that there are")
    first = numbers[0] if numbers == list(range(numbers[0], numbers[0] + bsz)) else None
    return Slots(cache, slots.to(device, non_blocking=slots.is_pinned()), first)
