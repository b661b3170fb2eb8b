"""Rows that are being generated, and what a stream says of them.

Knows tokens and text; knows no model and no tensors.
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
    """One token of one row, as `Llama.stream` yields it.

    row: place of the prompt in the batch; of n rows from each prompt, n * place and up. text: what this token made
    certain: nothing inside a split character, or while a stop may be coming. logprob: log-probability of the token
    under the model, or None unless asked for. finish_reason: None while the row goes on; "stop" for a token, or a text,
    that ends it, which is left out; "length" when the row's allowance is used up. stop: that token, or that text.
    length: tokens of the row's answer so far; where a text ends it, of what came before. top_logprobs: the likeliest
    tokens here, if asked for.
    """

    row: int
    token: int
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    length: int = 0
    top_logprobs: Alternatives | None = None


@dataclass
class Sequence:
    """Where a row stands, how far it may go, and its own source of chance. stops: tokens that end it."""

    index: int
    prompt: list[int]
    settings: Settings
    stops: frozenset[int]
    left: int  # tokens that it may still get
    decoder: AnyStreamDecoder
    generator: torch.Generator
    finder: StopFinder
    cached: int  # tokens of it in the KV cache
    answer: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    text: str = ""  # that was let out
    ends: list[int] = field(default_factory=list)  # characters of the answer after each of its tokens
    draws: list[torch.Tensor] = field(default_factory=list)  # for the tokens to come

    @property
    def position(self) -> int:
        """Tokens in the row so far."""
        return len(self.prompt) + len(self.answer)

    def draw(self, ahead: int) -> torch.Tensor:
        """The number in [0, 1) that chooses the row's next token, or the one so many tokens ahead: float32 ()."""
        while len(self.draws) <= ahead:
            self.draws.append(torch.rand((), generator=self.generator))
        return self.draws[ahead]

    def accept(self, token: int, logprob: float | None, top_logprobs: Alternatives | None) -> Step:
        self.left -= 1
        self.draws = self.draws[1:]
        stopped = token in self.stops
        if not stopped:
            self.answer.append(token)
        over = stopped or self.left == 0
        text = self.finder.push(("" if stopped else self.decoder.push(token)) + (self.decoder.flush() if over else ""))
        if not stopped:
            self.ends.append(self.finder.seen)
        self.text += text
        length = len(self.answer)
        if self.finder.found is not None:
            self.finish_reason, self.stop, length = "stop", self.finder.found, self._length_before(self.finder.start)
        elif over:
            text += self.finder.rest()
            self.finish_reason, self.stop = ("stop", token) if stopped else ("length", None)
        return Step(self.index, token, text, logprob, self.finish_reason, self.stop, length, top_logprobs)

    def _length_before(self, start: int) -> int:
        """Tokens that read as the text, or its beginning, before this character, which began a stop."""
        length = sum(end <= start for end in self.ends)
        while not self.text.startswith(self._decoded(length)):
            length -= 1  # the first part of a character that ended later
        return length

    def _decoded(self, length: int) -> str:
        self.decoder.flush()
        return "".join(map(self.decoder.push, self.answer[:length])) + self.decoder.flush()


def in_common(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """How many items two sequences begin with alike."""
    most = min(len(a), len(b))
    return most if a[:most] == b[:most] else next(i for i in range(most) if a[i] != b[i])
