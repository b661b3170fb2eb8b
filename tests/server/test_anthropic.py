"""Anthropic's official client, unmodified."""

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message
from jsonschema import validate
from running_server import Running

DIALOG: Any = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS: Any = [
    {"name": "weather", "description": "It tells.", "input_schema": {**SCHEMA, "additionalProperties": False}}
]


@pytest.fixture
def client(tool_server: Running) -> Anthropic:
    return Anthropic(base_url=tool_server.url, api_key="none", max_retries=0)


def check(message: Message) -> None:
    Message.model_validate(message.model_dump(), strict=True)


def test_a_message_whole_and_streamed(tool_server: Running, client: Anthropic) -> None:
    whole = client.messages.create(
        model="demo", messages=DIALOG, max_tokens=20, extra_body={"temperature": 0}, system="Be short."
    )
    check(whole)
    dialog: Any = [{"role": "system", "content": "Be short."}, *DIALOG]
    (expected,) = tool_server.llama.chat_completion([dialog], temperature=0, max_gen_len=20)
    (block,) = whole.content
    assert block.type == "text" and block.text == expected["generation"]["content"]
    assert whole.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[expected["finish_reason"]]
    with client.messages.stream(
        model="demo", messages=DIALOG, max_tokens=20, extra_body={"temperature": 0}, system="Be short."
    ) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    read = final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    assert read == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_events(client: Anthropic) -> None:
    """Each block begins, goes on and ends; the message begins first and ends last."""
    events = list(
        client.messages.create(model="demo", messages=DIALOG, max_tokens=20, extra_body={"temperature": 0}, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_used(client: Anthropic, streams: bool) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": DIALOG, "max_tokens": 200, "tools": TOOLS}
    asked["tool_choice"] = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    if streams:
        with client.messages.stream(**asked) as stream:
            message: Message = stream.get_final_message()
    else:
        message = client.messages.create(**asked)
    check(message)
    (block,) = message.content
    assert message.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "weather"
    validate(block.input, SCHEMA)


def test_results_of_tools_and_stop_sequences(client: Anthropic) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}
    dialog = [*DIALOG, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    message = client.messages.create(model="demo", messages=dialog, max_tokens=5, tools=TOOLS)
    check(message)
    stopped = client.messages.create(
        model="demo", messages=DIALOG, max_tokens=30, extra_body={"temperature": 0}, stop_sequences=["France"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "France")


def test_count_tokens(tool_server: Running, client: Anthropic) -> None:
    count = client.messages.count_tokens(model="demo", messages=DIALOG)
    assert count.input_tokens == len(tool_server.llama.formatter.encode_dialog_prompt(DIALOG))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": [{"role": "system", "content": "a"}]}, "expected user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "block of type image"),
        ({"messages": [{"role": "user", "content": "a", "cache": 1}]}, "unknown key 'cache'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking can't be asked for"),
        ({"extra_body": {"temperature": 2}}, "temperature"),
        ({"max_tokens": 5000}, "maximum context length"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no tool of the client's"),
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "bogus": 1}]}]}, "bogus"),
        ({"messages": [*DIALOG, {"role": "assistant", "content": "The"}]}, "ends with one of the assistant's"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}, "strict": True}]}, "strict"),
        ({"extra_body": {"tool_choice": {"type": "none", "zzz": 1}}}, "zzz"),
    ],
)
def test_what_is_wrong_is_refused(client: Anthropic, options: dict[str, Any], words: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        client.messages.create(**{"model": "demo", "messages": DIALOG, "max_tokens": 5, **options})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", messages=DIALOG, max_tokens=5)
