"""Which copy of a model answers a prompt: the one that has computed its beginning, unless others have much less to do.

Knows prefixes as hashes, and copies by any name that they have; knows no HTTP, no rank and no model.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
CAPACITY = 65_536  # prefixes that are remembered
HASH_BYTES = 16
MOST_PARTS = 4_096  # of a prompt, that are looked at


class Router(Generic[K]):
    """Remembers which copies were given which prefixes, the most recent ones.

    It may be wrong: a copy may have let go of what it computed. That costs the time to compute it again, and no more.
    """

    def __init__(self, slack: int, capacity: int = CAPACITY):
        """slack: how much more than the least loaded copy another one may have to do, and be chosen for a prefix."""
        self._slack, self._capacity = slack, capacity
        self._holders: OrderedDict[bytes, set[K]] = OrderedDict()  # by prefix, the least recent first
        self._turn = 0
        self._last_turns: dict[K, int] = {}  # when each copy was given a prompt

    def __len__(self) -> int:
        """Prefixes that are remembered."""
        return len(self._holders)

    def choose(self, prefixes: Sequence[bytes], loads: Mapping[K, int]) -> K:
        """The copy for a prompt. prefixes: see `hash_prefixes`; loads: what each copy has to do, at least one copy.

        Of the copies with little enough to do, those that have its longest prefix; of these the least loaded, and of
        equal ones that which was given none for longest.
        """
        least = min(loads.values())
        copies = {copy for copy, load in loads.items() if load <= least + self._slack}
        for prefix in reversed(prefixes):
            if found := copies & self._holders.get(prefix, set()):
                return self._least_loaded(found, loads)
        return self._least_loaded(loads, loads)

    def note(self, prefixes: Sequence[bytes], copy: K) -> None:
        """A copy was given a prompt, and has its prefixes from now on."""
        self._turn += 1
        self._last_turns[copy] = self._turn
        for prefix in reversed(prefixes):  # so that the longest is forgotten first
            self._holders.setdefault(prefix, set()).add(copy)
            self._holders.move_to_end(prefix)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def forget(self, copy: K) -> None:
        """A copy has ended, and holds nothing."""
        self._last_turns.pop(copy, None)
        for prefix in [prefix for prefix, copies in self._holders.items() if copy in copies]:
            self._holders[prefix].discard(copy)
            if not self._holders[prefix]:
                del self._holders[prefix]

    def _least_loaded(self, copies: Iterable[K], loads: Mapping[K, int]) -> K:
        return min(copies, key=lambda copy: (loads[copy], self._last_turns.get(copy, 0)))


def hash_prefixes(parts: Iterable[bytes]) -> list[bytes]:
    """A hash for each beginning of a prompt that ends with one of its parts, such as messages or blocks of tokens."""
    hashes: list[bytes] = []
    last = b""
    for part in parts:
        last = blake2b(last + part, digest_size=HASH_BYTES).digest()
        hashes.append(last)
        if len(hashes) == MOST_PARTS:
            break
    return hashes
