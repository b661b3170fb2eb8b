"""The messages of a request as chat formats get them. What a format would leave out in silence is refused by name.

Knows the API's messages and what a model's template looks at; knows no endpoint.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LlamaError
from ..tokenization.chat_template import TemplateFormat, find_variables
from ..tokenization.messages import DIALOG_OPTIONS, DialogOptions
from ..tokenization.protocol import AnyChatFormat
from .errors import bad_value, refused, unknown_key, unsupported

# What templates do with reasoning is theirs: most leave it out on purpose. Which call a result belongs to, its place
# says too, and so does the call the result's name.
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
ROLES = ("system", "user", "assistant")


def encode_dialog(formatter: AnyChatFormat, given: Sequence[Mapping[str, Any]], options: DialogOptions) -> list[int]:
    """The prompt's tokens. Raises ApiError."""
    messages = [read_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    check_template(formatter, messages, options)
    try:
        tokens = formatter.encode_dialog_prompt(messages, **options)  # type: ignore[arg-type]
        for group in {find_group(message) for message in messages if "name" in message} - {"tool"}:
            without = [remove_name(message) if find_group(message) == group else message for message in messages]
            if formatter.encode_dialog_prompt(without, **options) == tokens:  # type: ignore[arg-type]
                place = next(i for i, m in enumerate(messages) if "name" in m and find_group(m) == group)
                raise unsupported(f"messages[{place}].name", "is nothing that this model's chat template writes")
    except LlamaError as e:
        raise refused(e, "messages") from e
    return tokens


def find_group(message: Mapping[str, Any]) -> str:
    """The role, if it is one of the API's: so that there are few."""
    return message["role"] if message.get("role") in (*ROLES, "tool") else "other"


def remove_name(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "name"}


def check_template(formatter: AnyChatFormat, messages: Sequence[Mapping[str, Any]], options: DialogOptions) -> None:
    """Raise ApiError for tools, calls and variables that the model's template doesn't look at."""
    variables = find_variables(formatter)
    for name in options.get("chat_template_kwargs") or {}:
        if name not in variables:
            known = ", ".join(sorted(variables - DIALOG_OPTIONS)) or "none"
            raise unsupported("chat_template_kwargs", f"has {name[:40]!r}; this model's template knows {known}")
    if not isinstance(formatter, TemplateFormat):
        return
    tokenizer = formatter.tokenizer
    if options.get("tools") and tokenizer.tool_template is None and "tools" not in variables:
        raise unsupported("tools", "can't be told to this model: its chat template doesn't write them")
    source = (tokenizer.tool_template if options.get("tools") else None) or tokenizer.chat_template or ""
    for i, message in enumerate(messages):
        if "tool_calls" in message and "tool_calls" not in source:
            raise unsupported(f"messages[{i}].tool_calls", "is nothing that this model's chat template writes")


def read_message(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message without keys that say nothing, and with the arguments of calls as templates want them: as objects."""
    message = {key: value for key, value in given.items() if key == "content" or not is_empty(value)}
    check_keys(message, MESSAGE_KEYS, place)
    if message.get("role") == "developer":  # the newer name of what templates call "system"
        message["role"] = "system"
    if isinstance(message.get("content"), list):
        for i, part in enumerate(message["content"]):
            if isinstance(part, Mapping) and part.get("type") == "text":  # of others the type is told
                check_keys(part, {"type", "text"}, f"{place}.content[{i}]")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise bad_value(f"{place}.tool_calls is no list of calls", f"{place}.tool_calls")
        message["tool_calls"] = [read_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def is_empty(value: Any) -> bool:
    """Whether a key with this value says nothing: clients send back what they read, with all keys that it had."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or value == []


def read_call(call: Any, place: str) -> dict[str, Any]:
    """A call that the assistant made, with its arguments as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise bad_value(f"{place} is no call: expected id, type function, and function with name and arguments", place)
    check_keys(call, {"id", "type", "function"}, place)
    check_keys(function, {"name", "arguments"}, f"{place}.function")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        where = f"{place}.function.arguments"
        raise bad_value(f"{where} is not the JSON text of an object", where)
    return {**call, "function": {**function, "arguments": arguments}}


def check_keys(given: Mapping[str, Any], known: set[str], place: str) -> None:
    """Raise ApiError for a key that the API doesn't have, or that this server can't do anything with."""
    if unknown := sorted(key for key in given.keys() - known if not is_empty(given[key])):
        raise unknown_key(place, unknown[0])
