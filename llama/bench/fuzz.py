"""Random bodies for every endpoint: valid ones that were changed at random places, and bytes that are no JSON at all.

The same seed gives the same bodies. Knows the protocols' fields; knows no server.
"""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

DIALOG = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is the capital of France?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": PARAMETERS}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "it", "schema": PARAMETERS, "strict": True}}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["\n\n", "."], "logit_bias": {"5": -3, "9": 2.5}}
BESIDE = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}

EXAMPLES: list[tuple[str, dict[str, Any]]] = [  # valid bodies, whose answers are short
    ("/v1/chat/completions", {"model": "demo", "messages": DIALOG, "max_tokens": 4, **SAMPLING, "n": 2, "user": "me"}),
    (
        "/v1/chat/completions",
        {
            "messages": [*DIALOG, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
            "max_completion_tokens": 3,
            "tools": [TOOL],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": DIALOG, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}, **BESIDE},
    ),
    ("/v1/chat/completions", {"messages": DIALOG, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": DIALOG, "max_tokens": 9, "response_format": SCHEMA}),
    ("/v1/chat/completions", {"messages": DIALOG, "max_tokens": 9, "response_format": {"type": "json_object"}}),
    (
        "/v1/chat/completions",
        {"messages": DIALOG, "max_tokens": 9, "response_format": {"type": "regex", "regex": "[a-c]{2,4}|é"}},
    ),
    ("/v1/chat/completions", {"messages": DIALOG, "chat_template_kwargs": {}, "max_tokens": 2, "store": False}),
    ("/v1/completions", {"prompt": ["The sea", "A friend"], "max_tokens": 3, "best_of": 2, "logprobs": 2, **SAMPLING}),
    ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 3, "stream": True, "cache_prompt": False}),
    ("/v1/completions", {"prompt": "The sea", "echo": True, "max_tokens": 0, "logprobs": 1}),
    ("/v1/completions", {"prompt": "The sea", "max_tokens": 3, "num_beams": 3, "n": 2}),
    ("/v1/responses", {"input": "What is the sea?", "max_output_tokens": 3, "instructions": "Be short."}),
    ("/v1/responses", {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 3, "stream": True}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 9, "text": {"format": {"type": "json_object"}}}),
    (
        "/v1/messages",
        {
            "model": "demo",
            "messages": DIALOG[1:],
            "system": [{"type": "text", "text": "Be short."}],
            "max_tokens": 3,
            "stop_sequences": ["."],
            "metadata": {"user_id": "me"},
            "temperature": 0.5,
        },
    ),
    (
        "/v1/messages",
        {
            "model": "demo",
            "messages": [
                *DIALOG[1:],
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sunny"}]},
            ],
            "tools": [{"name": "weather", "description": "tells", "input_schema": PARAMETERS}],
            "max_tokens": 3,
            "stream": True,
        },
    ),
    ("/v1/messages/count_tokens", {"model": "demo", "messages": DIALOG[1:], "system": "Be short."}),
    ("/v1/embeddings", {"input": ["The sea", "A friend"], "encoding_format": "base64", "model": "demo"}),
    ("/v1/embeddings", {"input": [1, 2, 3]}),
    ("/tokenize", {"prompt": "The sea", "add_special_tokens": False}),
    ("/tokenize", {"messages": DIALOG}),
    ("/detokenize", {"tokens": [1, 2, 3], "model": "demo"}),
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, 1e-300, 10**30, 1 << 63, -(1 << 63), float("nan")),
    *(float("inf"), "", "a", "\0", "\ud800", "\udfff\ud800", "\ufffe", "🙂" * 30, "é" * 3000, "\n", "1", "null"),
    *([], {}, [[]], [None], [{}], {"": None}, {"type": "x"}, {"type": None}, [1, "a"], ["a", 1], [[1], "a"]),
    *("json_object", "required", "user", "assistant", "tool", "function", "{{ 7 * 7 }}", "<|eot_id|>", "(", "[z-a]"),
    *({"type": "string"}, {"$ref": "#"}, {"anyOf": []}, {"enum": []}, {"type": "text", "text": "a"}, {"role": "user"}),
]
DEEP = 2000  # arrays in arrays


def draw_bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(path, body) so many times."""
    for number in range(count):
        yield draw_body(random.Random(f"{seed} {number}"))


def draw_body(rng: random.Random) -> tuple[str, bytes]:
    path, example = rng.choice(EXAMPLES)
    match rng.choices(["changed", "mixed", "damaged", "garbage"], [70, 10, 12, 8])[0]:
        case "changed":
            return path, dump(change(rng, example, rng.randint(1, 3)))
        case "mixed":
            other = rng.choice(EXAMPLES)[1]
            return path, dump({**example, **dict(rng.sample(sorted(other.items()), rng.randint(1, len(other))))})
        case "damaged":
            return path, damage(rng, dump(example))
        case _:
            return path, rng.choice([rng.randbytes(rng.randrange(200)), dump(rng.choice(ODD)), b"[" * DEEP, b""])


def dump(value: Any) -> bytes:
    """JSON, with halves of characters as they are escaped, and numbers that are none."""
    return json.dumps(value).encode()


def change(rng: random.Random, value: Any, times: int) -> Any:
    """A copy that differs at so many random places."""
    value = deepcopy(value)
    for _ in range(times):
        holders = [*list_holders(value)]
        change_holder(rng, rng.choice(holders))
    return value


def list_holders(value: Any) -> Iterator[Any]:
    """All objects and arrays in a value."""
    if isinstance(value, dict | list):
        yield value
        for one in value.values() if isinstance(value, dict) else value:
            yield from list_holders(one)


def change_holder(rng: random.Random, holder: Any) -> None:
    """Put an odd value in, take one out, or write one twice."""
    keys = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
    what = rng.choices(["replace", "remove", "add", "wrap"], [60, 15, 15, 10])[0] if keys else "add"
    odd = deepcopy(rng.choice(ODD))
    key = rng.choice(keys) if keys else None
    if what == "replace":
        holder[key] = odd
    elif what == "remove":
        del holder[key]
    elif what == "wrap":
        holder[key] = rng.choice([[holder[key]], {"a": holder[key]}, [holder[key]] * 3])
    elif isinstance(holder, list):
        holder.append(odd)
    else:
        holder[rng.choice(["foo", "", "type", "content", "n", "tools", "\ud800"])] = odd


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, or of which some were written over, put in or taken out."""
    place = rng.randrange(len(data))
    noise = rng.choice([rng.randbytes(rng.randint(1, 4)), b"\xff", b"\0", b'"', b"}", b"\xed\xa0\x80", b"1e999", b","])
    return rng.choice([data[:place], data[:place] + noise + data[place:], data[:place] + noise + data[place + 2 :]])
