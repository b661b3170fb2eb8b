"""Calls of tools and structured answers, by the official client."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from jsonschema import validate
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from published_tokenizers import AGENT, IM, MISTRAL, S, qwen, save, sentencepiece
from pydantic import BaseModel
from running_server import Running, start
from tiny import ARGS, write_checkpoint

from llama import Llama
from llama.tokenization.hf_tokenizer import HFTokenizer

DIALOG: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "It tells.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture
def client(tool_server: Running) -> OpenAI:
    return OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0)


def test_a_named_tool_is_called(client: OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model="demo", messages=DIALOG, tools=TOOLS, tool_choice=choice, max_tokens=100, seed=1
    )
    ChatCompletion.model_validate(answer.model_dump(), strict=True, extra="forbid")
    (one,) = answer.choices
    assert one.finish_reason == "tool_calls" and one.message.content is None
    (call,) = one.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather" and call.id.startswith("call_")
    validate(json.loads(call.function.arguments), SCHEMA)


def test_calls_in_chunks(client: OpenAI) -> None:
    """Index, id and name first, then arguments in pieces; the reason at last."""
    stream = client.chat.completions.create(
        model="demo",
        messages=DIALOG,
        tools=TOOLS,
        tool_choice="required",
        max_tokens=100,
        seed=2,
        stream=True,
        parallel_tool_calls=False,
    )
    chunks = list(stream)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True, extra="forbid")
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert {call.index for call in calls} == {0} and calls[0].id and calls[0].function is not None
    assert calls[0].function.name in ("weather", "clock") and calls[0].function.arguments == ""
    assert all(call.id is None and call.function and call.function.name is None for call in calls[1:])
    json.loads("".join(call.function.arguments or "" for call in calls if call.function))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


NESTED = {
    "type": "object",
    "properties": {"zone": {"$ref": "#/$defs/Zone"}},
    "required": ["zone"],  # that there may be no others goes without saying
    "$defs": {"Zone": {"enum": ["UTC", "CET"]}},
}
WRITES_CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ '[TOOL_CALLS]' if messages[0].tool_calls }}"
THINKS = AGENT.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")


@pytest.mark.parametrize("form", ["Qwen", "Qwen whose prompt begins to think", "Mistral", "Mistral with names"])
@pytest.mark.parametrize("streams", [False, True])
def test_other_forms_are_held_to_a_call(tmp_path: Path, form: str, streams: bool) -> None:
    """A model of random weights makes the call, with arguments that are what the schema describes."""
    if form.startswith("Qwen"):
        folder = save(tmp_path, qwen(), {**IM, "chat_template": THINKS if "think" in form else AGENT})
    else:
        controls = ["[INST]", "[/INST]", "[TOOL_CALLS]", *(["[ARGS]"] if "names" in form else [])]
        folder = save(tmp_path, sentencepiece(controls, legacy=False), {**S, "chat_template": WRITES_CALLS + MISTRAL})
    model = Llama.build(
        write_checkpoint(tmp_path / "tiny", ARGS), max_seq_len=1024, device="cpu", dtype="float32"
    ).model
    tools: Any = [{"type": "function", "function": {"name": "now", "parameters": NESTED}}]
    with ExitStack() as stack:
        server = start(stack, Llama(model, HFTokenizer(folder)))
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "demo", "messages": DIALOG, "tools": tools, "max_tokens": 100}
        asked["tool_choice"] = "required" if streams else {"type": "function", "function": {"name": "now"}}
        if streams:
            with client.chat.completions.stream(**asked) as stream:
                answer: ChatCompletion = stream.get_final_completion()
        else:
            answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "now"
    validate(json.loads(call.function.arguments), {**NESTED, "additionalProperties": False})


def test_a_model_without_a_form_of_calls_refuses_tools(start_server: Any) -> None:
    plain = OpenAI(base_url=f"{start_server().url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="nothing in this model's files tells how it writes calls"):
        plain.chat.completions.create(model="demo", messages=DIALOG, tools=TOOLS)


def test_what_is_no_call_is_content(tool_server: Running, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=DIALOG, tools=TOOLS, temperature=0, max_tokens=30)
    (expected,) = tool_server.llama.chat_completion([DIALOG], temperature=0, max_gen_len=30, tools=TOOLS)
    assert answer.choices[0].message.content == expected["generation"]["content"]
    assert answer.choices[0].message.tool_calls is None


def test_results_of_tools_are_read(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    dialog = [*DIALOG, {"role": "assistant", "content": None, "tool_calls": [call]}]
    dialog.append({"role": "tool", "tool_call_id": "call_1", "content": "12:00"})
    answer = client.chat.completions.create(model="demo", messages=dialog, tools=TOOLS, max_tokens=5)
    assert answer.choices[0].finish_reason in ("stop", "length")


REQUIRED = {"tool_choice": "required"}


class Report(BaseModel):
    city: Literal["Paris", "Rome"]
    warm: bool


def test_parse(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="demo", messages=DIALOG, response_format=Report, max_tokens=500)
    assert isinstance(answer.choices[0].message.parsed, Report)


@pytest.mark.parametrize("kind", ["regex", "choice"])
def test_forms_beside_the_api(client: OpenAI, kind: str) -> None:
    wanted: Any = (
        {"type": "regex", "regex": "[0-9]{3}"} if kind == "regex" else {"type": "choice", "choice": ["a", "b"]}
    )
    answer = client.chat.completions.create(
        model="demo", messages=DIALOG, max_tokens=9, extra_body={"response_format": wanted}
    )
    content = answer.choices[0].message.content or ""
    assert content in ("a", "b") if kind == "choice" else content.isdigit() and len(content) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "auto"}, "tool_choice goes with tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice is none, auto, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names no tool"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is no function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "is no JSON schema"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "expected letters, digits"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], **REQUIRED},
            "response_format|schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "goes without tools"),
    ],
)
def test_what_is_wrong_is_refused(client: OpenAI, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**{"model": "demo", "messages": DIALOG, **options})
