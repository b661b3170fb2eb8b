"""What generation returns: completions, collected from a stream, and the dicts that Meta's programs read.

Knows steps and tokenizers; knows no model.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..errors import LlamaError
from ..tokenization.protocol import AnyTokenizer
from ..tokenization.texts import decode_token, name_tokens
from ..tokenization.tool_parser import AnswerMessage
from .sequence import Alternatives, FinishReason, Step
from .sequence import Sequence as TokenSequence


class TopToken(TypedDict):
    """One of the likeliest tokens at a place. Several may have one text, such as U+FFFD of a part of a character."""

    id: int
    text: str
    logprob: float


class Details(TypedDict, total=False):
    """The keys of a prediction beside its text. All but finish_reason are there only where they apply."""

    finish_reason: FinishReason
    stop: int | str  # what ended the answer, where a stop did
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[dict[str, float]]  # by the tokens' texts, the likeliest first: see `texts.name_tokens`
    top_tokens: list[list[TopToken]]  # the same tokens with their ids
    prompt_logprobs: list[float]
    score: float  # of a beam


class CompletionPrediction(Details, total=False):
    generation: str


class ChatPrediction(Details, total=False):
    generation: AnswerMessage


@dataclass
class Completion:
    """An answer to one prompt. What was not asked for is None."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # of the answer, without the stop
    text: str = ""
    finish_reason: FinishReason = "length"  # as in `Step`
    stop: int | str | None = None  # as in `Step`
    logprobs: list[float] | None = None  # of `tokens`, computed in float32
    top_logprobs: list[Alternatives] | None = None  # as in `Step`
    prompt_logprobs: list[float] | None = None  # of the prompt's tokens; 0.0 for the first, which nothing predicts
    score: float | None = None  # of a beam
    mean_logprob: float | None = None  # of all tokens that were chosen, the stop included
    acceptance: float | None = None  # the share of the tokens proposed that the model chose


def collect(stream: Iterable[list[Step]], sequences: Sequence[TokenSequence]) -> list[Completion]:
    """The completions that a stream of these sequences makes, in their order.

    Where some fail, the LlamaError that the stream ends with gets `answers`: the completions, None for those.
    """
    steps_by_row: list[list[Step]] = [[] for _ in sequences]
    error: LlamaError | None = None
    try:
        for batch in stream:
            for step in batch:
                steps_by_row[step.row].append(step)
    except LlamaError as e:
        error = e
    completions = [make_completion(*pair) for pair in zip(sequences, steps_by_row, strict=True)]
    if error is not None:
        error.answers = [None if s.error is not None else c for s, c in zip(sequences, completions, strict=True)]
        raise error
    return completions


def make_completion(sequence: TokenSequence, steps: Sequence[Step]) -> Completion:
    """The completion that a sequence's steps make."""
    completion = Completion(list(sequence.prompt), acceptance=sequence.acceptance)
    if sequence.output.echo:
        echoed, steps = steps[: len(completion.prompt)], steps[len(completion.prompt) :]
        completion.prompt_logprobs = [step.logprob or 0.0 for step in echoed]
    fill_completion(completion, steps)
    return completion


def fill_completion(completion: Completion, steps: Sequence[Step]) -> None:
    """Set the fields of a completion from the steps of its answer."""
    completion.text = "".join(step.text for step in steps)
    if steps:
        completion.finish_reason, completion.stop = steps[-1].finish_reason or "length", steps[-1].stop
    kept = steps[: steps[-1].length] if steps else []
    completion.tokens = [step.token for step in kept]
    completion.logprobs = [step.logprob for step in kept if step.logprob is not None]
    if logprobs := [step.logprob for step in steps if step.logprob is not None]:
        completion.mean_logprob = math.fsum(logprobs) / len(logprobs)
    completion.top_logprobs = [step.top_logprobs for step in kept if step.top_logprobs is not None]


def select_best(completions: Sequence[Completion], best_of: int, n: int) -> list[Completion]:
    """Of each `best_of` completions of a prompt, the `n` with the highest mean logprob, the best first."""
    groups = [completions[start : start + best_of] for start in range(0, len(completions), best_of)]
    return [c for group in groups for c in sorted(group, key=lambda c: -(c.mean_logprob or 0.0))[:n]]


def describe_completion(completion: Completion, tokenizer: AnyTokenizer, echo: bool = False) -> Details:
    """The keys of a prediction beside its text. echo: its tokens begin with the prompt's."""
    details: Details = {"finish_reason": completion.finish_reason}
    if completion.stop is not None:
        details["stop"] = completion.stop
    if completion.logprobs is not None:
        tokens, logprobs = completion.tokens, completion.logprobs
        if echo:
            tokens, logprobs = completion.prompt + tokens, (completion.prompt_logprobs or []) + logprobs
        details["tokens"], details["logprobs"] = [decode_token(tokenizer, token) for token in tokens], logprobs
    if completion.top_logprobs:
        details["top_logprobs"] = [name_tokens(tokenizer, best) for best in completion.top_logprobs]
        details["top_tokens"] = [
            [{"id": token, "text": decode_token(tokenizer, token), "logprob": p} for token, p in best]
            for best in completion.top_logprobs
        ]
    if completion.score is not None:
        details["score"] = completion.score
    if completion.prompt_logprobs is not None and not echo:
        details["prompt_logprobs"] = completion.prompt_logprobs
    return details
