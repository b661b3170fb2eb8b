"""The tools of a request: which the model may call, and the form that holds it to calling one.

Knows schemas of functions, forms of calls and how grammars are written; knows no model.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.grammar import JSON_SPACE
from ..tokenization.protocol import AnyTokenizer
from ..tokenization.tool_calls import Layout, ToolForm
from .errors import bad_value, unsupported
from .messages import check_keys
from .protocol import ChatBody

NAME = re.compile(r"[\w.-]{1,128}")  # of functions: what all forms of calls can say
OPENING = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "if"}  # keys of a schema
SPACE = {"x-guidance": {"whitespace_pattern": JSON_SPACE}}


def read_tools(
    body: ChatBody, form: ToolForm, tokenizer: AnyTokenizer
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
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
    return body.tools, {"type": "grammar", "grammar": write_grammar(wanted, form, tokenizer)}


def write_grammar(tools: Sequence[Mapping[str, Any]], form: ToolForm, tokenizer: AnyTokenizer) -> str:
    """A Lark grammar of one call of one of these tools, as models of this form write it."""
    layout = choose_layout(form, tokenizer)
    marks = {mark: write_mark(mark, tokenizer) for mark in (layout.open, *layout.ends, *layout.name_ends)}
    before, after = "", ""
    if layout.begin:
        before, after = f"{marks[layout.open]} {json.dumps(layout.begin)} ", f" {marks[layout.ends[0]]}"
    elif layout.name_ends:
        before = f"{marks[layout.open]} "
    elif layout.open:  # marks on lines of their own
        before, after = rf'{marks[layout.open]} "\n" ', rf' "\n" {marks[layout.ends[0]]}'
    calls = []
    for tool in tools:
        name = json.dumps(tool["function"]["name"])
        arguments = "%json " + json.dumps({**close_schema(tool["function"].get("parameters") or {}), **SPACE})
        if layout.name_ends:
            calls.append(f"{name} {marks[layout.name_ends[-1]]} {arguments}")
        else:
            head = f'{{"name": {name}, "{form.argument_keys[0]}": '
            calls.append(f'{json.dumps(head)} {arguments} "}}"')
    alternatives = " | ".join(f"call_{i}" for i in range(len(calls)))
    return "\n".join(
        [f"start: {before}({alternatives}){after}", *(f"call_{i}: {call}" for i, call in enumerate(calls))]
    )


def close_schema(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of arguments, without any that the function doesn't name, unless it says that there may be others."""
    if parameters and ("properties" not in parameters or OPENING & parameters.keys()):
        return parameters
    return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}


def choose_layout(form: ToolForm, tokenizer: AnyTokenizer) -> Layout:
    """The form's layout for this vocabulary: names and marks, where it has the marks, or else JSON objects."""
    fitting = [
        layout for layout in form.layouts if layout.name_ends and layout.name_ends[-1] in tokenizer.special_tokens
    ]
    return next(iter(fitting), form.layouts[0])


def write_mark(mark: str, tokenizer: AnyTokenizer) -> str:
    """A mark in a grammar: its token, or its text where it is none."""
    token = tokenizer.special_tokens.get(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise ApiError for what is no function's schema in the API's shape."""
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise bad_value(f"tools[{i}] is no function: expected type function, and function", f"tools[{i}]")
        check_keys(tool, {"type", "function"}, f"tools[{i}]")
        check_keys(function, {"name", "description", "parameters", "strict"}, f"tools[{i}].function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad_value(f"tools[{i}].function has no name", f"tools[{i}].function.name")
        if not NAME.fullmatch(function["name"]):
            message = (
                f"tools[{i}].function.name is {function['name'][:40]!r}, expected letters, digits, '_', '-' and '.'"
            )
            raise bad_value(message, f"tools[{i}].function.name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            where = f"tools[{i}].function.parameters"
            raise bad_value(f"{where} is no JSON schema: expected an object", where)
