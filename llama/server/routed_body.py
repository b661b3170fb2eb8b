"""What a router has to know of a request: the parts of its prompt, and how many answers it asks for.

Reads the bodies of all endpoints alike, and says nothing of mistakes in them: those are the endpoint's.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

FIELDS = ("tools", "system", "instructions", "messages", "prompt", "input")  # of a prompt, in the order that it has
FIRST_BLOCK = 64  # bytes


class Routed(NamedTuple):
    """What a body says."""

    parts: list[bytes]  # of the prompt; prompts that begin alike have parts that begin alike
    answers: int = 1


def read_routed(body: bytes) -> Routed:
    """The parts of a body's prompt; none where it has no prompt, or none that begins at what the cache holds."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return Routed([])
    if not isinstance(asked, dict):
        return Routed([])
    if asked.get("cache_prompt") is False:
        return Routed([], count_answers(asked))
    parts = [part for name in FIELDS if asked.get(name) for part in split(asked[name])]
    return Routed(parts, count_answers(asked))


def split(value: Any) -> Iterator[bytes]:
    """A text, ids, or a list of texts or messages, in parts."""
    if isinstance(value, list) and not isinstance(value[0], int):
        for one in value:
            yield from cut(write(one))
    else:
        yield from cut(write(value))


def write(value: Any) -> bytes:
    """JSON, without the end that what goes on doesn't have."""
    text = json.dumps(value, sort_keys=True)
    return (text if isinstance(value, dict) else text[:-1]).encode()


def cut(data: bytes) -> Iterator[bytes]:
    """Blocks of 64, 64, 128, 256, ... bytes: few, and half of what texts have in common is seen at least."""
    start, end = 0, FIRST_BLOCK
    while start < len(data):
        yield data[start:end]
        start, end = end, 2 * end


def count_answers(asked: dict[str, Any]) -> int:
    """How many answers are generated."""
    prompt = asked.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    counts = [value for name in ("n", "best_of") if isinstance(value := asked.get(name), int)]
    return prompts * max([1, *counts])
