"""The tools of a request: which the model may call, and the form that holds it to calling one.

Knows schemas of functions and forms of calls; knows no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..tokenization.tool_calls import ToolForm
from .errors import bad_value, unsupported
from .protocol import ChatBody

FORCED = ("llama",)  # forms whose calls are plain JSON, so that a grammar can ask for one


def read_tools(body: ChatBody, form: ToolForm) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(the tools that may be called, the `response_format` that forces a call, if one is forced). Raises ApiError."""
    check_tools(body.tools or [])
    choice = body.tool_choice
    if choice is not None and not body.tools:
        raise bad_value("tool_choice goes with tools", "tool_choice")
    if not body.tools or choice == "none":
        return [], None
    if not form.layouts:
        raise unsupported("tools", "can't be called: nothing in this model's files tells how it writes calls")
    if choice in (None, "auto"):
        return body.tools, None
    names = [tool["function"]["name"] for tool in body.tools]
    if choice == "required":
        wanted = body.tools
    elif isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        wanted = [tool for tool in body.tools if tool["function"]["name"] == choice["function"].get("name")]
        if not wanted:
            raise bad_value(f"tool_choice names no tool of {names}", "tool_choice")
    else:
        raise bad_value("tool_choice is none, auto, required, or a function by its name", "tool_choice")
    if form.name not in FORCED:
        raise unsupported("tool_choice", f"is none or auto here: calls of the form {form.name} can't be forced")
    return body.tools, {"type": "json_schema", "json_schema": {"name": "call", "schema": write_schema(wanted, form)}}


def write_schema(tools: Sequence[Mapping[str, Any]], form: ToolForm) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                form.argument_keys[0]: tool["function"].get("parameters") or {"type": "object", "properties": {}},
            },
            "required": ["name", form.argument_keys[0]],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise ApiError for what is no function's schema in the API's shape."""
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise bad_value(f"tools[{i}] is no function: expected type function, and function", f"tools[{i}]")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad_value(f"tools[{i}].function has no name", f"tools[{i}].function.name")
