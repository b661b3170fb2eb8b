"""POST /v1/messages: Anthropic's protocol, which coding agents speak. A dialog in, blocks of text and calls out.

Its body becomes that of a chat, and its answer's deltas become events:
https://docs.anthropic.com/en/api/messages. Knows how that protocol reads and writes; `dialog` answers.
"""

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..tokenization.tool_parser import ArgumentPiece, CallStart, ContentPiece, Delta, ReasoningPiece
from .dialog import DialogRequest, Running
from .errors import bad_value, unknown_key
from .messages import check_keys
from .protocol import Body, ChatBody, Number
from .service import Service

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens"""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessageBody(CountBody):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


# --- what is asked ----------------------------------------------------------------------------------------------------


def read_body(body: CountBody) -> ChatBody:
    """The same dialog as a chat's body. Raises ApiError for what a chat can't have."""
    if body.thinking is not None and body.thinking.get("type") != "disabled":
        raise bad_value("thinking can't be asked for here: a model thinks or doesn't", "thinking")
    messages = [] if body.system is None else [{"role": "system", "content": read_text(body.system, "system")}]
    for i, message in enumerate(body.messages):
        messages += read_message(message, f"messages[{i}]")
    if messages and messages[-1]["role"] == "assistant":
        raise bad_value("messages ends with one of the assistant's: this server can't go on with it", "messages")
    asked: dict[str, Any] = {"model": body.model, "messages": messages}
    if body.tools:
        asked["tools"] = [read_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        asked |= read_choice(body.tool_choice)
    if isinstance(body, MessageBody):
        asked |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences or None}
        asked |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    return ChatBody(**asked)


# Of each kind of block. What a request begins with is in the KV cache anyway, whatever cache_control says.
BLOCK_KEYS = {
    "text": {"type", "text", "cache_control"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
    "tool_use": {"type", "id", "name", "input", "cache_control"},
    "thinking": {"type", "thinking", "signature"},
}
TOOL_KEYS = {"type", "name", "description", "input_schema", "cache_control"}


def read_text(content: Any, place: str) -> str:
    """A text, or blocks of it, as one text."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [content]:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise bad_value(f"{place} has a block of type {kind}, expected text", place)
        check_keys(block, BLOCK_KEYS["text"], place)
        texts.append(block["text"])
    return "".join(texts)


def read_message(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """A message as those of a chat: results of tools become messages of their own."""
    if unknown := sorted(message.keys() - {"role", "content"}):
        raise unknown_key(place, unknown[0])
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise bad_value(f"{place} has the role {str(role)[:40]!r}, expected user or assistant", place)
    if not isinstance(content, list):
        return [{"role": role, "content": read_text(content, place)}]
    texts, results, calls, thoughts = [], [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in BLOCK_KEYS:
            check_keys(block, BLOCK_KEYS[kind], place)
        if kind == "tool_result" and role == "user":
            result = read_text(block.get("content") or "", place)
            result = f"Error: {result}" if block.get("is_error") else result
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        else:
            texts.append(read_text([block], place))
    own: dict[str, Any] = {"role": role, "content": "".join(texts) if texts or not calls else None}
    own |= {"tool_calls": calls} if calls else {}
    own |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return [*results, own] if texts or calls or not results else results


def read_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom" or not isinstance(tool.get("input_schema"), dict):
        raise bad_value(f"{place} is no tool of the client's: expected name, description and input_schema", place)
    check_keys(tool, TOOL_KEYS, place)
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def read_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[Any, Any] = {"auto": "auto", "any": "required", "none": "none"}
    kinds["tool"] = {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") not in kinds:
        raise bad_value(f"tool_choice is none of {', '.join(kinds)}", "tool_choice")
    check_keys(
        choice, {"type", "disable_parallel_tool_use", *(["name"] if choice["type"] == "tool" else [])}, "tool_choice"
    )
    return {
        "tool_choice": kinds[choice["type"]],
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
    }


def count_tokens(service: Service, body: CountBody) -> dict[str, Any]:
    return {"input_tokens": len(DialogRequest(service, read_body(body)).encode())}


# --- what is answered -------------------------------------------------------------------------------------------------


class MessageAnswer:
    """One request to the endpoint."""

    def __init__(self, service: Service, body: MessageBody):
        """Raises ApiError for what can't be asked."""
        self._request = DialogRequest(service, read_body(body))
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.options.model,
        }

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        deltas: list[Delta] = []
        async with self._request.run() as running:
            async for _, new, _ in self._request.read(running):
                deltas += new
            usage = count_usage(running)
        return {**self._head, "content": make_blocks(deltas), **describe_end(running), "usage": usage}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as events."""
        writer = BlockWriter()
        async with self._request.run() as running:
            first = True
            async for _, deltas, _ in self._request.read(running):
                if first:  # now it is known how much of the prompt was cached
                    first = False
                    empty: dict[str, Any] = {
                        "content": [],
                        "stop_reason": None,
                        "stop_sequence": None,
                        "usage": count_usage(running),
                    }
                    yield {"type": "message_start", "message": {**self._head, **empty}}
                for delta in deltas:
                    for event in writer.write(delta):
                        yield event
            for event in writer.close():
                yield event
            yield {"type": "message_delta", "delta": describe_end(running), "usage": count_usage(running)}
            yield {"type": "message_stop"}


def describe_end(running: Running) -> dict[str, Any]:
    """Why an answer has ended."""
    (reader,) = running.readers
    stop = reader.steps[-1].stop if reader.steps else None
    if isinstance(stop, str) and not reader.has_calls:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": STOP_REASONS[reader.finish_reason], "stop_sequence": None}


def count_usage(running: Running) -> dict[str, int]:
    """The tokens; of the prompt those that the cache had are counted apart, as the protocol has it."""
    cached = running.answers.cached_tokens
    return {
        "input_tokens": running.answers.prompt_tokens - cached,
        "output_tokens": running.tokens,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def make_blocks(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """The blocks that deltas make up."""
    writer, blocks = BlockWriter(), list[dict[str, Any]]()
    inputs: dict[int, str] = {}
    for event in [*(event for delta in deltas for event in writer.write(delta)), *writer.close()]:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            index, delta = event["index"], event["delta"]
            if delta["type"] == "input_json_delta":
                inputs[index] = inputs.get(index, "") + delta["partial_json"]
            else:
                blocks[index][KEYS[delta["type"]]] += delta[KEYS[delta["type"]]]
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


KEYS = {"text_delta": "text", "thinking_delta": "thinking"}


class BlockWriter:
    """Writes deltas as events of blocks: each begins, goes on, and ends before the next one begins."""

    def __init__(self) -> None:
        self._kind, self._index = "", -1  # of the block that is open

    def write(self, delta: Delta) -> list[dict[str, Any]]:
        match delta:
            case ContentPiece(text):
                events = self._open("text", {"type": "text", "text": ""})
                return [*events, self._go_on({"type": "text_delta", "text": text})]
            case ReasoningPiece(text):
                events = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*events, self._go_on({"type": "thinking_delta", "thinking": text})]
            case CallStart(index, identity, name):
                return self._open(f"call {index}", {"type": "tool_use", "id": identity, "name": name, "input": {}})
            case ArgumentPiece(_, text):
                return [self._go_on({"type": "input_json_delta", "partial_json": text})]

    def close(self) -> list[dict[str, Any]]:
        """The end of the block that is open."""
        if not self._kind:
            return []
        self._kind = ""
        return [{"type": "content_block_stop", "index": self._index}]

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        if kind == self._kind:
            return []
        events = self.close()
        self._kind, self._index = kind, self._index + 1
        return [*events, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _go_on(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
