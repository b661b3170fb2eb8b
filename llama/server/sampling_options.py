"""What a request asks of sampling, as settings of the library.

Knows bodies and settings; knows no prompt and no answer.
"""

from typing import Any

from .errors import ApiError, bad_value, unsupported
from .protocol import MOST_CHOICES, Sampling

SAME = ("seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty")
NOT_WITH_BEAMS = ("stream", "seed", "top_p", "top_k", "min_p", "stop", "best_of", "logprobs", "echo", "response_format")
SMALLEST_TOP_P = 1e-9  # the API's 0 takes the likeliest token, as this does


def read_settings(body: Sampling) -> dict[str, Any]:
    """The settings that a request sets. Raises ApiError."""
    settings = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.top_p is not None:
        settings["top_p"] = max(body.top_p, SMALLEST_TOP_P)
    if body.stop is not None:
        settings["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias is not None:
        settings["logit_bias"] = {read_id(token): bias for token, bias in body.logit_bias.items()}
    if body.stream_options is not None and not body.stream:
        raise bad_value("stream_options goes with stream: true", "stream_options")
    return read_beams(body, settings) if body.has_beams else settings


def read_beams(body: Sampling, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a search for the likeliest answers. Raises ApiError for what has no meaning there."""
    for name in NOT_WITH_BEAMS:
        value = getattr(body, name, None)
        if value is not None and value is not False and value != {"type": "text"}:
            raise unsupported(name, "goes without num_beams: beams are searched for, not drawn, and come as a whole")
    if (body.n or 1) > (body.num_beams or 1):
        raise bad_value(f"n is {body.n} and num_beams {body.num_beams}: expected at most as many answers", "n")
    return {**settings, "temperature": body.temperature or 0.0}


def read_id(token: str) -> int:
    if not token.isascii() or not token.isdigit() or len(token) > 9:
        raise bad_value(f"logit_bias has {token[:40]!r}, expected token ids", "logit_bias")
    return int(token)


def check_length(prompt_tokens: int, most: int | None, max_seq_len: int, param: str) -> None:
    """Raise ApiError where there is no room for an answer. most: tokens that were asked for."""
    room = max_seq_len - prompt_tokens
    if room < (1 if most is None else most):
        asked = "" if most is None else f" ({prompt_tokens} in the prompt, {most} for the answer)"
        message = (
            f"This model's maximum context length is {max_seq_len} tokens. However, you requested "
            f"{prompt_tokens + (most or 0)} tokens{asked}. Please reduce the length of the prompt or of the answer."
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def count_choices(n: int | None, best_of: int | None = None) -> int:
    """How many answers to each prompt are generated."""
    if best_of is not None and best_of < (n or 1):
        raise bad_value(f"best_of is {best_of} and n is {n}: expected at least n", "best_of")
    return min(max(n or 1, best_of or 1), MOST_CHOICES)
