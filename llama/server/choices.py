"""Steps of answers as the API writes tokens, logprobs and the count of tokens.

Knows steps and a tokenizer; knows no endpoint.
"""

from collections.abc import Sequence
from typing import Any

from ..engine.sequence import Step
from ..tokenization.protocol import AnyTokenizer
from ..tokenization.texts import prime
from .beams import Search
from .service import Answers


def describe_token(tokenizer: AnyTokenizer, token: int, logprob: float) -> dict[str, Any]:
    """{"token", "logprob", "bytes"}; -9999 stands for minus infinity, as in the API."""
    data = tokenizer.decode_bytes(token)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def describe_logprobs(tokenizer: AnyTokenizer, steps: Sequence[Step], top: int) -> dict[str, Any]:
    """The logprobs of a choice of a chat."""
    content = [
        {
            **describe_token(tokenizer, step.token, step.logprob or 0.0),
            "top_logprobs": [describe_token(tokenizer, *pair) for pair in (step.top_logprobs or ())[:top]],
        }
        for step in steps
    ]
    return {"content": content, "refusal": None}


class TokenPlacer:
    """Tells which tokens are certain to be in a text, and where they begin in it.

    A token is held back while its text may begin a stop, or is a part of a character: what is streamed and what comes
    as a whole have the same tokens.
    """

    def __init__(self, tokenizer: AnyTokenizer, prompt: Sequence[int], echoed: int = 0, hidden: int = 0):
        """echoed: tokens of the prompt that come first. hidden: so many of these have no text."""
        self._decoder = tokenizer.stream_decoder()
        if not echoed:
            prime(self._decoder, prompt)
        self._echoed, self._hidden = echoed, hidden
        self._count = 0  # tokens that came
        self._decoded = self._written = 0  # characters of all tokens, and those that are certain
        self._held: list[tuple[Step, int]] = []
        self._ends: list[int | None] = []  # where those held end in the text; None: inside of a character

    def push(self, step: Step, is_over: bool = False) -> list[tuple[Step, int]]:
        """The steps that are certain with this one, each with its place. is_over: no step follows."""
        start, is_hidden = self._decoded, self._count < self._hidden
        self._count += 1
        text = self._decoder.push(step.token)
        self._decoded += 0 if is_hidden else len(text)
        self._written += 0 if is_hidden else len(step.text)
        self._held.append((step, start))
        self._ends.append(self._decoded if text else None)
        if step.finish_reason is not None and self._count > self._echoed:
            certain = max(len(self._held) - (self._count - self._echoed - step.length), 0)
        elif is_over or self._count <= self._echoed:
            certain = len(self._held)
        else:
            known = [i + 1 for i, end in enumerate(self._ends) if end is not None and end <= self._written]
            certain = max(known, default=0)
        placed, self._held, self._ends = self._held[:certain], self._held[certain:], self._ends[certain:]
        return placed


def count_usage(answers: Answers | Search, completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    prompt = answers.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
