"""What generation gives back: a stream drained to one answer a row, and the dicts that Meta's programs read.

Knows steps and tokenizers; knows no model.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..tokenization.protocol import AnyTokenizer
from ..tokenizer import Message
from .sequence import Alternatives, FinishReason, Step


class Details(TypedDict, total=False):
    """What every prediction has, and what it has where that was asked for."""

    finish_reason: FinishReason
    stop: int | str  # where one was met
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    prompt_logprobs: list[float]
    score: float  # of a beam


class CompletionPrediction(Details, total=False):
    generation: str


class ChatPrediction(Details, total=False):
    generation: Message


@dataclass
class Completion:
    """An answer to one prompt. finish_reason, stop, top_logprobs: as in `Step`. logprobs: of its tokens, in float32.

    prompt_logprobs: of the prompt's tokens, 0.0 for the first, which nothing predicts. score: of beams. mean_logprob:
    of all that was chosen, the stop too, where logprobs were asked for.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    stop: int | str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[Alternatives] | None = None
    prompt_logprobs: list[float] | None = None
    score: float | None = None
    mean_logprob: float | None = None


def drained(
    stream: Iterable[list[Step]], prompts: Sequence[Sequence[int]], n: int, prompt_logprobs: bool
) -> list[Completion]:
    """The answers that a stream comes to, n to each prompt. prompt_logprobs: it begins with the prompts themselves."""
    found = [Completion([int(token) for token in prompt]) for prompt in prompts for _ in range(n)]
    steps: list[list[Step]] = [[] for _ in found]
    for batch in stream:
        for step in batch:
            steps[step.row].append(step)
    for one, own in zip(found, steps, strict=True):
        if prompt_logprobs:
            echoed, own = own[: len(one.prompt)], own[len(one.prompt) :]
            one.prompt_logprobs = [step.logprob or 0.0 for step in echoed]
        one.text = "".join(step.text for step in own)
        if own:
            one.finish_reason, one.stop = own[-1].finish_reason or "length", own[-1].stop
        kept = own[: own[-1].length] if own else []
        one.tokens = [step.token for step in kept]
        one.logprobs = [step.logprob for step in kept if step.logprob is not None]
        if chances := [step.logprob for step in own if step.logprob is not None]:
            one.mean_logprob = math.fsum(chances) / len(chances)
        one.top_logprobs = [step.top_logprobs for step in kept if step.top_logprobs is not None]
    return found


def best_of_each(found: Sequence[Completion], made: int, n: int) -> list[Completion]:
    """Of each `made` answers to a prompt the `n` of the highest mean logprob, the best first."""
    groups = [found[start : start + made] for start in range(0, len(found), made)]
    return [one for group in groups for one in sorted(group, key=lambda one: -(one.mean_logprob or 0.0))[:n]]


def details(one: Completion, tokenizer: AnyTokenizer, echo: bool = False) -> Details:
    """What a prediction says beside its text. echo: its tokens begin with the prompt's."""
    found: Details = {"finish_reason": one.finish_reason}
    if one.stop is not None:
        found["stop"] = one.stop
    if one.logprobs is not None:
        tokens, logprobs = one.tokens, one.logprobs
        if echo:
            tokens, logprobs = one.prompt + tokens, (one.prompt_logprobs or []) + logprobs
        found["tokens"], found["logprobs"] = [tokenizer.decode([token]) for token in tokens], logprobs
    if one.top_logprobs:
        named = [[(tokenizer.decode([token]), chance) for token, chance in best] for best in one.top_logprobs]
        found["top_logprobs"] = [dict(reversed(best)) for best in named]  # of tokens that read alike the likeliest
    if one.score is not None:
        found["score"] = one.score
    if one.prompt_logprobs is not None and not echo:
        found["prompt_logprobs"] = one.prompt_logprobs
    return found
