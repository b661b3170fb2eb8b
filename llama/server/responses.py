"""POST /v1/responses: OpenAI's newer protocol. Items in, items of text, reasoning and calls out; nothing is kept.

Its body becomes that of a chat, which `dialog` answers: https://platform.openai.com/docs/api-reference/responses.
Knows what the endpoint is asked; how its items and events are written is `response_items`'.
"""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..settings import Settings
from .dialog import DialogRequest, Running
from .errors import ApiError, bad_value, unknown_key, unsupported
from .messages import check_keys
from .protocol import MOST_TOP_LOGPROBS, Body, ChatBody, Number
from .response_items import ItemWriter, describe_usage
from .service import Service

STATE = ("previous_response_id", "conversation", "background", "prompt")  # what needs a server that keeps responses
CHAT_NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
Short = Annotated[str, Field(max_length=64)]
Long = Annotated[str, Field(max_length=512)]


class TextOptions(Body):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class EventOptions(Body):
    include_obfuscation: Literal[False] | None = None


class ResponseBody(Body):
    """POST /v1/responses"""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: EventOptions | None = None
    metadata: Annotated[dict[Short, Long], Field(max_length=16)] | None = None
    user: str | None = None  # for the client's own records, as are the next two
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    previous_response_id: Any = None  # refused by name, as are the next three
    conversation: Any = None
    background: Any = None
    prompt: Any = None


# --- what is asked ----------------------------------------------------------------------------------------------------


def read_body(body: ResponseBody) -> ChatBody:
    """The same as a chat's body. Raises ApiError for what a chat can't have."""
    for name in STATE:
        if getattr(body, name):
            raise unsupported(name, "isn't there: this server keeps no responses; send the whole dialog as input")
    if body.stream_options is not None and not body.stream:
        raise bad_value("stream_options goes with stream: true", "stream_options")
    if body.top_logprobs is not None and not body.include:
        raise bad_value("top_logprobs goes with include: ['message.output_text.logprobs']", "top_logprobs")
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for i, item in enumerate(items):
        add_item(messages, item, f"input[{i}]")
    asked: dict[str, Any] = {"model": body.model, "messages": messages, "max_completion_tokens": body.max_output_tokens}
    asked |= {"temperature": body.temperature, "top_p": body.top_p, "parallel_tool_calls": body.parallel_tool_calls}
    asked |= {"logprobs": bool(body.include), "top_logprobs": body.top_logprobs}
    asked["tools"] = [read_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])] or None
    asked["tool_choice"] = read_choice(body.tool_choice) if body.tools or body.tool_choice != "auto" else None
    if body.text is not None and body.text.format is not None:
        asked["response_format"] = read_format(body.text.format)
    return ChatBody(**asked)


def add_item(messages: list[dict[str, Any]], item: dict[str, Any], place: str) -> None:
    """Add an item of the input to a chat's messages: what the assistant thought, said and called is one message."""
    kind = item.get("type") or "message"
    if not isinstance(kind, str) or kind not in ITEM_KEYS:
        raise unsupported(place, f"is of the type {str(kind)[:40]!r}, expected one of {', '.join(ITEM_KEYS)}")
    given = {key for key, value in item.items() if value is not None}
    if unknown := sorted(given - ITEM_KEYS[kind] - {"type", "id", "status"}):
        raise unknown_key(place, unknown[0])
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message":
        role, content = item.get("role"), read_text(item.get("content"), f"{place}.content")
        if role not in ("user", "assistant", "system", "developer"):
            raise bad_value(f"{place} has the role {str(role)[:40]!r}, expected user, assistant or system", place)
        if role == "assistant" and last is not None and last.keys() == {"role", "reasoning_content"}:
            last["content"] = content
        else:
            messages.append({"role": role, "content": content})
    elif kind == "function_call_output":
        output = read_text(item.get("output"), f"{place}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or ""
        messages.append({"role": "assistant", "reasoning_content": read_text(parts, f"{place}.content")})
    else:
        if last is None:
            messages.append(last := {"role": "assistant"})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last["tool_calls"] = [*last.get("tool_calls", []), call]


ITEM_KEYS = {
    "message": {"role", "content"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"summary", "content"},
}
PART_KEYS = {"type", "text", "logprobs"}
TEXT_KINDS = ("input_text", "output_text", "summary_text", "reasoning_text")


def read_text(content: Any, place: str) -> str:
    """A text, or parts that are text, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_value(f"{place} is a {type(content).__name__}, expected a text or parts of type input_text", place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_KINDS or not isinstance(part.get("text"), str):
            raise unsupported(f"{place}[{i}]", f"is of the type {str(kind)[:40]!r}, expected input_text or output_text")
        check_keys(part, PART_KEYS, f"{place}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def read_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """A function in the form that chats have."""
    if tool.get("type") != "function":
        found = str(tool.get("type"))[:40]
        raise unsupported(place, f"is of the type {found!r}, expected function: the server has no tools of its own")
    if unknown := sorted(tool.keys() - {"type", *TOOL_KEYS}):
        raise unknown_key(place, unknown[0])
    return {"type": "function", "function": {key: tool[key] for key in TOOL_KEYS if tool.get(key) is not None}}


TOOL_KEYS = ("name", "description", "parameters", "strict")


def read_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def read_format(text_format: dict[str, Any]) -> dict[str, Any]:
    """The form of an answer as chats have it."""
    kind = text_format.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise unsupported("text.format", f"is of the type {str(kind)[:40]!r}, expected text, json_object, json_schema")
    fields = {key: value for key, value in text_format.items() if key != "type"}
    return {"type": kind, "json_schema": fields} if kind == "json_schema" else text_format


# --- what is answered -------------------------------------------------------------------------------------------------


class ResponseAnswer:
    """One request to the endpoint."""

    def __init__(self, service: Service, body: ResponseBody):
        """Raises ApiError for what can't be asked."""
        self._request = DialogRequest(service, read_body(body), CHAT_NAMES)
        self._writer = ItemWriter(service.llama.tokenizer, body.top_logprobs or 0 if body.include else None)
        standard = {"temperature": Settings().temperature, "top_p": Settings().top_p, **service.options.defaults}
        given = {key: value for key, value in body.model_dump().items() if value is not None}
        self._head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": service.options.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "temperature": given.get("temperature", standard["temperature"]),
            "text": {"format": {"type": "text"}, **{k: v for k, v in given.get("text", {}).items() if v is not None}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{key: tool.get(key) for key in ("type", *TOOL_KEYS)} for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": given.get("top_p", standard["top_p"]),
            "truncation": "disabled",
            **{key: given[key] for key in ("user", "safety_identifier", "prompt_cache_key") if key in given},
        }

    async def complete(self) -> dict[str, Any]:
        """The whole response."""
        async with self._request.run() as running:
            async for _ in self._read(running):
                pass
            return self._finish(running)

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The response as events, which are numbered."""
        number = 0
        async for event in self._write_events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _write_events(self) -> AsyncIterator[dict[str, Any]]:
        begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
        async with self._request.run() as running:
            yield {"type": "response.created", "response": begun}
            yield {"type": "response.in_progress", "response": begun}
            try:
                async for event in self._read(running):
                    yield event
            except ApiError as e:
                error = {"code": "server_error", "message": str(e)}
                failed = {**begun, "status": "failed", "error": error, "output": self._writer.items}
                yield {"type": "response.failed", "response": failed}
                return
            response = self._finish(running)
            yield {"type": f"response.{response['status']}", "response": response}

    async def _read(self, running: Running) -> AsyncIterator[dict[str, Any]]:
        """The events of all items."""
        (reader,) = running.readers
        async for _, deltas, _ in self._request.read(running):
            for event in self._writer.write(reader.steps[-1], deltas, reader.was_reasoning):
                yield event
        for event in self._writer.end("incomplete" if reader.finish_reason == "length" else "completed"):
            yield event

    def _finish(self, running: Running) -> dict[str, Any]:
        """The response, once all is written."""
        (reader,) = running.readers
        ended = {"status": "completed", "output": self._writer.items, "usage": describe_usage(running)}
        if reader.finish_reason == "length":
            ended |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return {**self._head, **ended}
