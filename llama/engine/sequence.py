"""Sequences that are being generated, and the steps in which their callers are told of them.

Knows tokens and text; knows no model and no tensors but the random numbers of a sequence.
"""

from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ..settings import Settings
from ..tokenization.protocol import AnyStreamDecoder
from ..tokenization.texts import prime
from .stop_strings import StopFinder

if TYPE_CHECKING:
    from .grammar import Matcher
    from .speculative import Proposer

FinishReason = Literal["stop", "length"]
Consume = Callable[[int, torch.Tensor], None]  # a position, and the states of tokens from there on (T, dim)
ConsumeLogits = Callable[[torch.Tensor], object]  # float32 (vocab_size)
Alternatives = tuple[tuple[int, float], ...]  # tokens and their logprobs, the likeliest first


@dataclass(frozen=True)
class OutputOptions:
    """What the steps of a sequence report."""

    logprobs: bool = False
    echo: bool = False  # the prompt's own tokens first
    top: int = 0  # how many of the likeliest tokens


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


def read_alternatives(best: abc.Sequence[float], top: int) -> Alternatives | None:
    """Tokens and logprobs that come by turns, at most `top` of them."""
    pairs = zip(best[: 2 * top : 2], best[1 : 2 * top : 2], strict=True)
    return tuple((int(token), logprob) for token, logprob in pairs) if top else None


@dataclass(eq=False)
class Sequence:
    """One sequence: a prompt, its answer so far, and all that decides how it goes on."""

    index: int  # `Step.row`
    prompt: list[int]
    settings: Settings
    stops: frozenset[int]  # tokens that end it
    remaining: int  # tokens that it may still get
    decoder: AnyStreamDecoder  # a new one, which first gets the prompt
    generator: torch.Generator
    stop_finder: StopFinder
    output: OutputOptions
    scope: int | None  # sequences of equal scopes share what the KV cache holds; None: shares nothing
    matcher: "Matcher | None" = None  # what its answer is held to; only on the rank that chooses its tokens
    proposer: "Proposer | None" = None
    lookup_ngram: int | None = None  # of a proposer that looks tokens up
    most_proposals: int = 0  # tokens that are proposed at a time
    is_drained: bool = False  # whether its caller does nothing until it is over
    in_order: bool = False  # whether passes keep it in the order of arrival, and not of slots
    twin: "Sequence | None" = None  # an earlier one of the same call and prompt, which has the prompt's logprobs
    first: int = 1  # the first token of the prompt whose logprob is wanted, if any is
    is_read: bool = False  # whether it is only read: it gets no answer, and nobody wants its text
    consume: Consume | None = None  # gets the states of the prompt's tokens, which are all computed
    consume_logits: ConsumeLogits | None = None  # gets the logits after the last token
    notify: Callable[[], object] | None = None  # called where the engine serves, when there are steps or it is over
    key: int = 0  # its number among all that came to the engine; 0: it hasn't
    cast: torch.dtype | None = None  # of `torch.autocast` where it was asked for
    is_echoed: bool = False  # whether its steps have begun with the prompt's own tokens
    has_arrived: bool = False  # whether somebody has waited for it
    answer: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    text: str = ""  # what the stop finder has let through
    ends: list[int] = field(default_factory=list)  # characters of the answer up to and with each of its tokens
    draws: list[torch.Tensor] = field(default_factory=list)  # random numbers for the tokens to come
    prompt_logprobs: list[float] = field(default_factory=lambda: [0.0])  # of the prompt's tokens read so far
    prompt_tops: list[Alternatives | None] = field(default_factory=lambda: [None])  # the likeliest in their places
    steps: deque[Step] = field(default_factory=deque)  # that nobody has taken yet
    error: Exception | None = None  # why it failed
    is_over: bool = False  # whether it gets no further steps
    hit: int = 0  # tokens of the prompt that were cached when it was admitted
    proposed: int = 0  # tokens that were proposed
    accepted: int = 0  # those of them that the model chose

    def __post_init__(self) -> None:
        if not self.is_read:
            prime(self.decoder, self.prompt)
        self.prompt_logprobs += [0.0] * (self.first - 1)
        self.prompt_tops += [None] * (self.first - 1)

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer

    @property
    def acceptance(self) -> float | None:
        """The share of the tokens proposed that the model chose; None where none was proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from other logits than the model's."""
        return self.matcher is not None or self.settings.changes_logits

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

    def echo(self) -> list[Step]:
        """The prompt's own tokens as steps. A character that the answer completes is the answer's."""
        self.decoder.flush()
        texts = [self.decoder.push(token) for token in self.prompt]
        if self.remaining == 0:
            texts[-1] += self.decoder.flush()
        known, nothing = self.twin or self, [None] * len(texts)
        logprobs: abc.Sequence[float | None] = known.prompt_logprobs if self.output.logprobs else nothing
        tops: abc.Sequence[Alternatives | None] = known.prompt_tops if self.output.logprobs else nothing
        steps = zip(self.prompt, texts, logprobs, tops, strict=True)
        return [Step(self.index, token, text, p, top_logprobs=top) for token, text, p, top in steps]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logprobs of the prompt's tokens are to be computed for it."""
        return self.output.echo and self.output.logprobs and self.twin is None

    @property
    def needs_twin(self) -> bool:
        """Whether it waits for the logprobs of its twin's prompt, which aren't all there."""
        if self.twin is None or not (self.output.echo and self.output.logprobs):
            return False
        return len(self.twin.prompt_logprobs) < len(self.prompt)

    @property
    def reports_prompt(self) -> bool:
        """Whether its caller is told something when its prompt is read, even where no token follows."""
        return self.output.echo or self.consume is not None or self.consume_logits is not None

    @property
    def is_continued(self) -> bool:
        """Whether it goes on with an answer that other sequences have begun."""
        return self.is_read and bool(self.answer)

    @property
    def reads_all(self) -> bool:
        """Whether a pass reads each token of the prompt, whatever the KV cache holds of it."""
        return self.wants_prompt_logprobs or self.consume is not None

    def _length_before(self, start: int) -> int:
        """How many tokens lie before the character at which a stop begins, and decode to the text before it."""
        length = sum(end <= start for end in self.ends)
        while length and not self.text.startswith(self._decode(length)):
            length -= 1  # its last token is a part of a character that a later token completed
        return length

    def _decode(self, length: int) -> str:
        """The text of the answer's first `length` tokens."""
        self.decoder.flush()
        prime(self.decoder, self.prompt)
        return "".join(map(self.decoder.push, self.answer[:length])) + self.decoder.flush()
