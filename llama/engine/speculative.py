"""Tokens that are proposed, so that the model checks several of them in one forward pass.

The model chooses every token as it does without proposals, from the same distribution with the same random number. So
the text is the same, sampled or not, and only the number of passes is smaller. Knows sequences, and a smaller model;
knows no text and not the model that checks.
"""

from collections import abc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import parallel
from ..model import Transformer
from .choices import Place, choose_tokens
from .forward_pass import compute_logits
from .model_runner import PassRow, run_rows
from .prefix_index import count_common
from .sequence import Sequence

SPECULATE_K = 5  # tokens that are proposed at a time
# From sequences, and the number of tokens that each may get at most, to the tokens proposed for each.
Proposer = Callable[[list[Sequence], list[int]], list[list[int]]]


def propose(sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
    """What each sequence's own proposer proposes, at most so many tokens."""
    proposals: list[list[int]] = [[] for _ in sequences]
    places: dict[Proposer, list[int]] = {}
    for i, (s, limit) in enumerate(zip(sequences, limits, strict=True)):
        if s.proposer is not None and limit > 0:
            places.setdefault(s.proposer, []).append(i)
    for proposer, members in places.items():
        found = proposer([sequences[i] for i in members], [limits[i] for i in members])
        for i, tokens in zip(members, found, strict=True):
            proposals[i] = tokens
    return proposals


def lookup(tokens: abc.Sequence[int], ngram: int, most: int) -> list[int]:
    """The up to `most` tokens that followed where the last `ngram` tokens occurred before, most recently.

    Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
    """
    tail = list(tokens[-ngram:])
    for start in range(len(tokens) - ngram - 1, -1, -1):
        if tokens[start : start + ngram] == tail:
            return list(tokens[start + ngram : start + ngram + most])
    return []


def look_up_all(ngram: int, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
    """`lookup` in each sequence's own tokens."""
    return [lookup(s.tokens, ngram, limit) for s, limit in zip(sequences, limits, strict=True)]


def make_lookup_proposer(ngram: int) -> Proposer:
    return partial(look_up_all, ngram)


class DraftProposer:
    """Proposes what a smaller model chooses, with each sequence's own random numbers, so that it is often right.

    A slot of the smaller model's cache keeps the tokens of earlier sequences, and what a new text has in common with
    them isn't computed again.
    """

    def __init__(self, model: Transformer, chunk: int):
        self._model = model
        self._chunk = chunk
        self._slots: dict[int, int] = {}  # by the keys of sequences, those used last at the end
        self._cached: list[list[int]] = [[] for _ in range(model.params.max_batch_size)]  # the tokens of each slot

    def __call__(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in sequences]
        slots = self._assign_slots(sequences)
        while places := [i for i, limit in enumerate(limits) if len(proposals[i]) < limit]:
            fed = [Place(sequences[i], proposals[i]) for i in places]
            logits = compute_logits(self._model, self._feed(fed, [slots[i] for i in places]))  # (B, vocab_size)
            tokens = torch.zeros(len(fed), dtype=torch.long, device=logits.device)
            if parallel.is_group_leader():
                tokens[:] = choose_tokens(logits, fed, {})
            for i, token in zip(places, parallel.broadcast(tokens).tolist(), strict=True):
                proposals[i].append(max(token, 0))
        return proposals

    def _assign_slots(self, sequences: list[Sequence]) -> list[int]:
        """The slot of each sequence: the one that it had, else of those that others don't need the most alike."""
        for s in sequences:
            if s.key in self._slots:
                self._slots[s.key] = self._slots.pop(s.key)
        for s in sequences:
            if s.key in self._slots:
                continue
            taken = {self._slots[other.key] for other in sequences if other.key in self._slots}
            used = [slot for slot in self._slots.values() if slot not in taken]  # the longest unused first
            fresh = [slot for slot in range(len(self._cached)) if slot not in {*used, *taken}]
            slot = max(fresh + used, key=lambda slot: count_common(self._cached[slot], s.tokens[:-1]))
            self._slots = {key: old for key, old in self._slots.items() if old != slot}
            self._slots[s.key] = slot
        return [self._slots[s.key] for s in sequences]

    def _feed(self, places: list[Place], slots: list[int]) -> Tensor:
        """Run the tokens that aren't cached yet through the model: the states of each place's last one (B, dim)."""
        if self._model.kv_cache.claim(self, len(self._cached), self._model.dtype, self._model.device):
            self._cached = [[] for _ in self._cached]
        wanted = [[*place.sequence.tokens, *place.proposals] for place in places]
        for slot, tokens in zip(slots, wanted, strict=True):
            del self._cached[slot][count_common(self._cached[slot], tokens[:-1]) :]
        chunk = max(self._chunk // len(places), 1)
        last: dict[int, Tensor] = {}
        while unread := [i for i in range(len(places)) if i not in last]:
            rows = [
                PassRow(
                    places[i].sequence, slots[i], start := len(self._cached[slots[i]]), wanted[i][start : start + chunk]
                )
                for i in unread
            ]
            for i, row, h in zip(unread, rows, run_rows(self._model, rows), strict=True):
                self._cached[row.slot] += row.tokens
                if len(self._cached[row.slot]) == len(wanted[i]):
                    last[i] = h[-1]
        return torch.stack([last[i] for i in range(len(places))])
