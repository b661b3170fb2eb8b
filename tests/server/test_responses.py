"""POST /v1/responses by the official client: whole, streamed, parsed; each object as the client's own types have it."""

import json
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_output_text import Logprob
from pydantic import BaseModel, TypeAdapter
from running_server import Running

from llama.engine.sequence import Step
from llama.server.response_items import ItemWriter
from llama.server.responses import ResponseBody, read_body
from llama.tokenization.tool_parser import ArgumentPiece, CallStart, ContentPiece, ReasoningPiece

ASKED = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "description": "It tells.", "parameters": SCHEMA, "strict": True}]
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def tool_client(tool_server: Running) -> OpenAI:
    return OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0)


def check(response: Response) -> None:
    """Raise unless the response has just the fields of the client's type, of just their types."""
    Response.model_validate(response.to_dict(mode="python"), strict=True, extra="forbid")


def read_events(client: OpenAI, **asked: Any) -> list[Any]:
    """The events of a stream, each checked, in the order of their numbers."""
    events = list(client.responses.create(model="demo", stream=True, **asked))
    for number, event in enumerate(events):
        EVENTS.validate_python(event.to_dict(mode="python"), strict=True, extra="forbid")
        assert event.sequence_number == number
    return events


def test_a_response_equals_the_chat(server: Running, client: OpenAI) -> None:
    answer = client.responses.create(
        model="demo", input=ASKED, temperature=0, max_output_tokens=20, metadata={"a": "b"}, user="me", store=False
    )
    check(answer)
    assert answer.output_text == ANSWER and answer.status == "completed" and answer.metadata == {"a": "b"}
    assert (answer.temperature, answer.max_output_tokens, answer.user) == (0, 20, "me")
    assert answer.usage is not None and answer.usage.total_tokens == answer.usage.input_tokens + 8
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": ASKED}],
        temperature=0,
        max_tokens=20,
    )
    with_instructions = client.responses.create(
        model="demo", input=ASKED, instructions="Be short.", temperature=0, max_output_tokens=20
    )
    assert with_instructions.output_text == chat.choices[0].message.content
    assert with_instructions.usage is not None and chat.usage is not None
    assert with_instructions.usage.input_tokens == chat.usage.prompt_tokens
    assert with_instructions.usage.input_tokens_details.cached_tokens > 0


def test_one_that_is_cut_off(client: OpenAI) -> None:
    answer = client.responses.create(model="demo", input=ASKED, temperature=0, max_output_tokens=3)
    check(answer)
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    *_, last = read_events(client, input=ASKED, temperature=0, max_output_tokens=3)
    assert last.type == "response.incomplete" and last.response.output_text == answer.output_text


def test_events_of_a_text(client: OpenAI) -> None:
    events = read_events(client, input=ASKED, temperature=0, max_output_tokens=20)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert {*kinds[4:-4]} == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == ANSWER
    assert events[-1].response.output == [events[-2].item] and events[-2].item.content == [events[-3].part]
    assert len({event.item_id for event in events[3:-2]} | {events[-2].item.id}) == 1
    with client.responses.stream(model="demo", input=ASKED, temperature=0, max_output_tokens=20) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_a_dialog_of_items(client: OpenAI) -> None:
    """What a response put out goes into the next one's input as it is."""
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": ASKED}]}]
    first = client.responses.create(
        model="demo", input=items, temperature=0, max_output_tokens=20, include=["message.output_text.logprobs"]
    )
    items += first.output
    items.append({"type": "message", "role": "user", "content": "And of Spain?"})
    second = client.responses.create(model="demo", input=items, temperature=0, max_output_tokens=8)
    chat = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "And of Spain?"},
        ],
        temperature=0,
        max_tokens=8,
    )
    assert second.output_text == chat.choices[0].message.content


def test_logprobs(client: OpenAI) -> None:
    asked: Any = {"input": ASKED, "temperature": 0, "max_output_tokens": 20, "top_logprobs": 2}
    asked["include"] = ["message.output_text.logprobs"]
    answer = client.responses.create(model="demo", **asked)
    check(answer)
    (item,) = answer.output
    assert item.type == "message" and item.content[0].type == "output_text" and item.content[0].logprobs
    logprobs: list[Logprob] = item.content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in logprobs).decode() == ANSWER
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": ASKED}], temperature=0, max_tokens=20, logprobs=True
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert [one.logprob for one in logprobs] == pytest.approx(
        [one.logprob for one in chat.choices[0].logprobs.content], abs=1e-5
    )
    deltas = [event for event in read_events(client, **asked) if event.type == "response.output_text.delta"]
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in logprobs]


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def test_parse(client: OpenAI) -> None:
    answer = client.responses.parse(model="demo", input=ASKED, text_format=Trip, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Trip)
    with client.responses.stream(model="demo", input=ASKED, text_format=Trip, max_output_tokens=60) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Trip)
    form: Any = {"format": {"type": "json_schema", "name": "trip", "schema": Trip.model_json_schema(), "strict": True}}
    check(client.responses.create(model="demo", input=ASKED, text=form, max_output_tokens=60))
    plain = client.responses.create(
        model="demo", input=ASKED, text={"format": {"type": "json_object"}}, max_output_tokens=40, temperature=0
    )
    check(plain)
    assert plain.output_text.startswith("{")


def test_reasoning_is_an_item_of_its_own(server: Running) -> None:
    """Each item ends before the next one begins, and each event is one of the client's types."""
    writer = ItemWriter(server.llama.tokenizer, None)
    step = Step(0, 300, None, " a")
    written = [ReasoningPiece("so"), ReasoningPiece(" ..."), ContentPiece("Yes."), CallStart(0, "call_1", "weather")]
    events = [
        *writer.write(step, [*written, ArgumentPiece(0, "{}"), CallStart(1, "call_2", "clock")], False),
        *writer.write(step, [ArgumentPiece(1, "{}")], False),
        *writer.end("completed"),
    ]
    for event in events:
        EVENTS.validate_python({**event, "sequence_number": 0}, strict=True, extra="forbid")
    edges = [event["type"].removeprefix("response.output_item.") for event in events if "item" in event]
    assert edges == ["added", "done"] * 4
    reasoning, message, *calls = writer.items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "so ..."}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "Yes." and [call["call_id"] for call in calls] == ["call_1", "call_2"]
    read = read_body(ResponseBody(input=writer.items)).messages
    assert [message.keys() - {"role"} for message in read] == [{"reasoning_content", "content", "tool_calls"}]


def test_a_function_is_called(tool_client: OpenAI) -> None:
    asked: Any = {"input": ASKED, "tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}}
    answer = tool_client.responses.create(model="demo", max_output_tokens=200, **asked)
    check(answer)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "weather" and call.status == "completed"
    assert json.loads(call.arguments).keys() == {"city"}
    events = read_events(tool_client, max_output_tokens=200, **asked)
    kinds = [event.type for event in events[2:]]
    assert kinds == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[2].item.arguments == "" and events[3].delta == events[4].arguments == events[5].item.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [{"role": "user", "content": ASKED}, call, output]
    check(tool_client.responses.create(model="demo", input=items, tools=TOOLS, max_output_tokens=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id isn't there"),
        ({"conversation": "conv_1"}, "conversation isn't there"),
        ({"background": True}, "background isn't there"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "unknown key 'colour'"),
        ({"input": []}, "messages|dialog"),
        ({"tools": [{"type": "web_search"}]}, "'web_search', expected function"),
        ({"text": {"format": {"type": "xml"}}}, r"text\.format is of the type 'xml'"),
        ({"text": {"verbosity": "high"}}, "verbosity"),
        ({"top_logprobs": 2}, "top_logprobs goes with include"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 5000}, "maximum context length"),
        ({"extra_body": {"foo": 1}}, "Unrecognized request argument supplied: foo"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client: OpenAI, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.responses.create(**{"model": "demo", "input": ASKED, **options})
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("text", [{"verbosity": "medium"}, {"format": None}])
def test_a_format_that_was_not_given_is_text(client: OpenAI, text: Any) -> None:
    answer = client.responses.create(model="demo", input=ASKED, text=text, max_output_tokens=3)
    check(answer)
    assert answer.text is not None and answer.text.to_dict()["format"] == {"type": "text"}
