"""The random numbers of each sequence: from a seed of its own, so that no sequence depends on its neighbours.

Knows token ids; knows no model and no settings.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

REMEMBERED_PROMPTS = 65_536


class SequenceSeeds:
    """Makes the random generators of sequences, for one `Llama`.

    A sequence without a seed gets one from `base_seed`, its prompt, and how often that prompt was given before. So the
    same prompt, given again, draws other numbers. Only the most recent prompts are counted; an older one starts anew.
    """

    def __init__(self, base_seed: int, capacity: int = REMEMBERED_PROMPTS):
        self._base_seed = base_seed
        self._capacity = capacity
        self.times_given: OrderedDict[bytes, int] = OrderedDict()  # by a digest of the prompt; the most recent is last

    def make_generator(self, prompt: Sequence[int], seed: int | None, copy: int) -> torch.Generator:
        """The generator of a sequence. seed: its own. copy: its number among the sequences of this prompt and call."""
        if seed is None:
            key = hashlib.blake2b(repr((self._base_seed, prompt)).encode(), digest_size=16).digest()
            key += b"%d" % self._count(key)
        else:
            key = repr((seed, prompt, copy)).encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))

    def _count(self, key: bytes) -> int:
        """How often the prompt was given, this time included."""
        self.times_given[key] = self.times_given.pop(key, 0) + 1
        if len(self.times_given) > self._capacity:
            self.times_given.popitem(last=False)
        return self.times_given[key]
