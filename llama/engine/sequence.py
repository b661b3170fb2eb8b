"""Sequences that are being generated, and the steps in which a stream reports them.

Knows tokens and text; knows no model and no tensors but the random numbers of a sequence.
"""

from collections import abc
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..settings import Settings
from ..tokenization.protocol import AnyStreamDecoder
from .stop_strings import StopFinder

FinishReason = Literal["stop", "length"]
Alternatives = tuple[tuple[int, float], ...]  # tokens and their logprobs, the likeliest first


@dataclass(frozen=True)
class Step:
    """One token of one sequence, as `Llama.stream` yields it."""

    row: int  # place of the prompt in the batch; copy j of n from each prompt: n * place + j
    token: int
    text: str  # the text that is certain since this token: no part of a character, nothing that may begin a stop
    logprob: float | None = None  # log-probability of the token under the model; None unless asked for
    # None: the sequence goes on. "stop": a token or a text ended it, which is left out. "length": its limit did.
    finish_reason: FinishReason | None = None
    stop: int | str | None = None  # the token or the text that ended it
    length: int = 0  # tokens of the answer so far; where a text ends it, those before that text
    top_logprobs: Alternatives | None = None  # the likeliest tokens here; None unless asked for


@dataclass
class Sequence:
    """One sequence: a prompt, its answer so far, and all that decides how it goes on."""

    index: int  # `Step.row`
    prompt: list[int]
    settings: Settings
    stops: frozenset[int]  # tokens that end it
    remaining: int  # tokens that it may still get
    decoder: AnyStreamDecoder
    generator: torch.Generator
    stop_finder: StopFinder
    cached: int  # tokens of it in the KV cache
    answer: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    text: str = ""  # what the stop finder has let through
    ends: list[int] = field(default_factory=list)  # characters of the answer up to and with each of its tokens
    draws: list[torch.Tensor] = field(default_factory=list)  # random numbers for the tokens to come

    @property
    def position(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)

    def draw(self, ahead: int) -> torch.Tensor:
        """The number in [0, 1) that chooses the next token (`ahead` 0) or the one `ahead` tokens later: float32 ()."""
        while len(self.draws) <= ahead:
            self.draws.append(torch.rand((), generator=self.generator))
        return self.draws[ahead]

    def accept(self, token: int, logprob: float | None, top_logprobs: Alternatives | None) -> Step:
        """Append the next token, or end at it where it is a stop."""
        self.remaining -= 1
        self.draws = self.draws[1:]
        is_stop = token in self.stops
        is_last = is_stop or self.remaining == 0
        text = ""
        if not is_stop:
            self.answer.append(token)
            text = self.decoder.push(token)
        text = self.stop_finder.push(text + (self.decoder.flush() if is_last else ""))
        if not is_stop:
            self.ends.append(self.stop_finder.seen)
        self.text += text
        length = len(self.answer)
        if self.stop_finder.stop is not None:
            self.finish_reason, self.stop = "stop", self.stop_finder.stop
            length = self._length_before(self.stop_finder.start)
        elif is_last:
            text += self.stop_finder.flush()
            self.finish_reason, self.stop = ("stop", token) if is_stop else ("length", None)
        return Step(self.index, token, text, logprob, self.finish_reason, self.stop, length, top_logprobs)

    def _length_before(self, start: int) -> int:
        """How many tokens lie before the character at which a stop begins, and decode to the text before it."""
        length = sum(end <= start for end in self.ends)
        while not self.text.startswith(self._decode(length)):
            length -= 1  # its last token is a part of a character that a later token completed
        return length

    def _decode(self, length: int) -> str:
        """The text of the answer's first `length` tokens."""
        self.decoder.flush()
        return "".join(map(self.decoder.push, self.answer[:length])) + self.decoder.flush()


def count_common_prefix(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """How many items `a` and `b` have in common at their beginning."""
    shorter = min(len(a), len(b))
    return shorter if a[:shorter] == b[:shorter] else next(i for i in range(shorter) if a[i] != b[i])
