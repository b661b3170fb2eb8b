"""Steps of answers as the API writes tokens, logprobs and the count of tokens.

Knows steps and a tokenizer; knows no endpoint.
"""

from collections.abc import Sequence
from typing import Any

from ..engine.sequence import Step
from ..tokenization.protocol import AnyTokenizer
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


def keep_before_stop(steps: Sequence[Step]) -> list[Step]:
    """The steps whose tokens belong to the answer, once it is over."""
    return list(steps[: steps[-1].length]) if steps and steps[-1].finish_reason is not None else list(steps)


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
