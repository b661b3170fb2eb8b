"""Ranks of which one submits: before each step it tells the others what arrived, what ended, and what is waited for.

Knows sequences and process groups; knows no model and no scheduler.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LlamaError
from ..settings import Settings
from .sequence import Sequence as TokenSequence
from .sequence_maker import SequenceMaker
from .stop_strings import StopFinder

MESSAGE_BYTES = 2048  # of a message's first part, with its length; what doesn't fit comes in a second one
LENGTH_BYTES = 8
SENT_FIELDS = (
    *("key", "index", "prompt", "stops", "remaining", "output", "scope", "most_proposals"),
    *("is_drained", "in_order", "first", "is_read", "answer"),
)


@dataclass(frozen=True)
class Commands:
    """What one step is to do. Equal commands have equal effects on all ranks."""

    waited: Sequence[int]  # keys of the sequences to compute
    arrived: Sequence[TokenSequence] = ()
    cancelled: Sequence[int] = ()  # keys
    closed_scopes: Sequence[int] = ()
    open_scopes: frozenset[int] = frozenset()
    forgets: bool = False  # whether the model was edited, so that nothing in the cache is used for what arrives
    resets: bool = False  # whether the slots hold nothing any more
    is_fast: bool = True  # whether passes run in the model's fast form
    by_hand: int = 0  # tokens that the caches of calls by hand hold
    has_failed: bool = False  # whether the step before raised an error


@dataclass(frozen=True)
class Farewell:
    """The last message: the numbers that the next sequence and scope get, on all ranks."""

    key: int
    scope: int


@dataclass(frozen=True)
class Arrival:
    """A sequence on its way to another rank, which computes it and chooses nothing."""

    fields: dict[str, Any]
    ngram: int | None  # of a proposer that looks tokens up
    twin: int | None  # a key
    consumes: tuple[bool, bool]  # states, logits

    @staticmethod
    def describe(s: TokenSequence) -> "Arrival":
        fields = {name: getattr(s, name) for name in SENT_FIELDS}
        fields["settings"] = replace(s.settings, logits_processor=None)
        consumes = s.consume is not None, s.consume_logits is not None
        return Arrival(fields, s.lookup_ngram, None if s.twin is None else s.twin.key, consumes)

    def make_sequence(
        self,
        maker: SequenceMaker,
        known: dict[int, TokenSequence],
    ) -> TokenSequence:
        """known: sequences by key, of which one may be the twin."""
        states, logits = self.consumes
        settings: Settings = self.fields["settings"]
        return TokenSequence(
            **self.fields,
            decoder=maker.tokenizer.stream_decoder(),
            generator=torch.Generator(),
            stop_finder=StopFinder(settings.stop),
            proposer=maker.make_proposer(self.ngram) if self.fields["most_proposals"] else None,
            lookup_ngram=self.ngram,
            twin=None if self.twin is None else known.get(self.twin),
            consume=ignore if states else None,
            consume_logits=ignore if logits else None,
        )


def ignore(*_: object) -> None:
    """What a rank does with states and logits that another one's caller wants."""


class Channel:
    """Messages from the first rank of a group to the others."""

    def __init__(self, group: dist.ProcessGroup):
        """group: on the CPU, of ranks that wait for each other for a long time."""
        self._group = group
        self._source = dist.get_global_rank(group, 0)

    def send(self, message: Commands | Farewell) -> None:
        if isinstance(message, Commands):
            message = replace(message, arrived=[Arrival.describe(s) for s in message.arrived])  # type: ignore[misc]
        data = pickle.dumps(message)
        padded = len(data).to_bytes(LENGTH_BYTES, "little") + data
        self._broadcast(as_tensor(padded[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")))
        if rest := padded[MESSAGE_BYTES:]:
            self._broadcast(as_tensor(rest))

    def receive(self) -> Any:
        """`Commands`, in which `arrived` holds `Arrival`s; or the `Farewell`."""
        first = self._broadcast(torch.empty(MESSAGE_BYTES, dtype=torch.uint8)).numpy().tobytes()
        length = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
        rest = b""
        if length > MESSAGE_BYTES:
            rest = self._broadcast(torch.empty(length - MESSAGE_BYTES, dtype=torch.uint8)).numpy().tobytes()
        return pickle.loads((first + rest)[LENGTH_BYTES:length])  # of a rank of this program

    def _broadcast(self, data: Tensor) -> Tensor:
        dist.broadcast(data, self._source, group=self._group)
        return data


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def follow_steps(channel: Channel, maker: SequenceMaker, carry_out: Callable[[Commands], None]) -> Farewell:
    """Carry out the steps of another rank until it says farewell. Raises LlamaError where one fails here alone."""
    error: Exception | None = None
    while isinstance(commands := channel.receive(), Commands):
        if commands.has_failed != (error is not None):
            raise LlamaError("a step failed on one rank and not on the others") from error
        known: dict[int, TokenSequence] = {}
        for arrival in cast(Sequence[Arrival], commands.arrived):
            s = arrival.make_sequence(maker, known)
            known[s.key] = s
        error = None
        try:
            carry_out(replace(commands, arrived=list(known.values())))
        except Exception as e:  # a hook's, for example, which the rank that leads raises too
            error = e
    return cast(Farewell, commands)
