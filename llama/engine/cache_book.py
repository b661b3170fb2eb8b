"""The book of the KV cache: what each slot holds, which are free, what may be dropped, and what all take together.

A slot is free, busy (it belongs to a request) or idle (a cached prefix that nobody owns). Slots of one scope are found
by what they hold. Knows no tensors and no requests; it decides nothing.
"""

import heapq
from collections import OrderedDict
from collections.abc import Container

from .prefix_index import Match, PrefixIndex

NO_TEXT: list[int] = []


class CacheBook:
    """Slots that together may take `budget` positions. The caller keeps to it: `room` says what is left.

    A slot's size is what it takes out of the budget: of an idle one the positions it holds, of a busy one also those
    that it will hold for certain.
    """

    def __init__(self, n_slots: int, budget: int) -> None:
        self.n_slots = n_slots
        self.budget = budget
        self.by_hand = 0  # positions that calls by hand have taken
        self.held = 0  # the sizes of all slots together
        self.idle_held = 0  # those of the idle ones
        self.sizes = [0] * n_slots
        self._texts = [NO_TEXT] * n_slots  # a slot holds a beginning of its text, which is its request's own list
        self._scopes: list[int | None] = [None] * n_slots  # who may find it; None: nobody
        self._free = list(range(n_slots))  # a heap: rows at neighbouring slots are cheaper
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._prefixes: dict[int, PrefixIndex] = {}  # by scope

    @property
    def room(self) -> int:
        """Positions that may still be taken. Negative where calls by hand have taken more than there was."""
        return self.budget - self.by_hand - self.held

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def is_idle(self, slot: int) -> bool:
        return slot in self._idle

    def is_shared(self, slot: int) -> bool:
        """Whether others may use what it holds."""
        return self._scopes[slot] is not None

    def find_least_recent(self, kept: Container[int | None]) -> int | None:
        """The idle slot that wasn't used for the longest time, apart from those in `kept`."""
        return next((slot for slot in self._idle if slot not in kept), None)

    def find(self, scope: int, text: list[int], most: int) -> Match:
        """The longest beginning of text[:most] that slots of this scope hold."""
        prefixes = self._prefixes.get(scope)
        return prefixes.find(text, most) if prefixes else Match()

    def take(self, text: list[int], size: int, scope: int | None) -> int:
        """A free slot becomes busy with a text, of which it holds nothing."""
        slot = heapq.heappop(self._free)
        self._texts[slot], self._scopes[slot] = text, scope
        self.resize(slot, size)
        return slot

    def adopt(self, slot: int, text: list[int], length: int, size: int) -> None:
        """An idle slot becomes busy with a text, and keeps the first `length` positions, which the texts share."""
        del self._idle[slot]
        self.idle_held -= self.sizes[slot]
        self._texts[slot] = text
        self.record(slot, length)
        self.resize(slot, size)

    def resize(self, slot: int, size: int) -> None:
        """Change what a busy slot takes."""
        self.held += size - self.sizes[slot]
        self.sizes[slot] = size

    def record(self, slot: int, length: int) -> None:
        """Its first `length` positions are computed, and are found from now on."""
        scope = self._scopes[slot]
        if scope is not None and length:
            self._prefixes.setdefault(scope, PrefixIndex()).insert(slot, self._texts[slot], length)

    def retire(self, slot: int, length: int) -> None:
        """A busy slot becomes idle; it holds its first `length` positions."""
        self.resize(slot, length)
        self.record(slot, length)
        self._idle[slot] = None
        self.idle_held += length

    def touch(self, slot: int) -> None:
        """An idle slot was of use: it is dropped after the others."""
        self._idle.move_to_end(slot)

    def release(self, slot: int) -> None:
        """An idle or busy slot becomes free."""
        if slot in self._idle:
            del self._idle[slot]
            self.idle_held -= self.sizes[slot]
        self._hide(slot)
        self.resize(slot, 0)
        self._texts[slot] = NO_TEXT
        heapq.heappush(self._free, slot)

    def release_scope(self, scope: int) -> list[int]:
        """Free the idle slots of a scope; returns them."""
        slots = [slot for slot in self._idle if self._scopes[slot] == scope]
        for slot in slots:
            self.release(slot)
        return slots

    def forget(self) -> list[int]:
        """Nothing that is held now is ever found again. Frees the idle slots, and returns them."""
        slots = list(self._idle)
        for slot in slots:
            self.release(slot)
        self._scopes = [None] * self.n_slots
        self._prefixes.clear()
        return slots

    def _hide(self, slot: int) -> None:
        scope = self._scopes[slot]
        self._scopes[slot] = None
        if scope is not None and (prefixes := self._prefixes.get(scope)) is not None:
            prefixes.remove(slot)
            if not prefixes:
                del self._prefixes[scope]
