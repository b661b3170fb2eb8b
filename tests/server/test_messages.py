"""The messages of a request: all that they say comes to the model, or is refused by its name."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from published_tokenizers import AGENT, CHATML, IM, NOW, TOOL, qwen, save
from running_server import Running

from llama.server.errors import ApiError
from llama.server.messages import encode_dialog
from llama.tokenization.chat_template import make_formatter
from llama.tokenization.hf_tokenizer import HFTokenizer

USER = {"role": "user", "content": "Who are you?"}
CALL = {"id": "a1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC", "n": [1, 2.5]}'}}
NAMED = AGENT.replace("m.role + '\n'", "m.role + (' ' + m.name if m.name and m.role == 'user' else '') + '\n'")


def make(folder: Path, template: str) -> Any:
    return make_formatter(HFTokenizer(save(folder, qwen(), {**IM, "chat_template": template})), NOW)


def refusal(formatter: Any, messages: list[Any], **options: Any) -> tuple[str, str]:
    """(the parameter, the message) with which a dialog is refused."""
    with pytest.raises(ApiError) as caught:
        encode_dialog(formatter, messages, options)  # type: ignore[arg-type]
    return caught.value.body["error"]["param"], str(caught.value)


def test_a_name_comes_to_the_model_or_is_refused(tmp_path: Path, server: Running) -> None:
    named = {**USER, "name": "Ada"}
    for formatter in (make(tmp_path, CHATML), server.llama.formatter):
        param, message = refusal(formatter, [USER, named])
        assert param == "messages[1].name" and "chat template" in message
    formatter = make(tmp_path, NAMED)
    assert "user Ada" in formatter.tokenizer.decode(encode_dialog(formatter, [named], {}))
    param, _ = refusal(formatter, [named, {"role": "assistant", "content": "Me.", "name": "Bob"}, USER])
    assert param == "messages[1].name"


def test_arguments_of_calls_come_as_objects(tmp_path: Path) -> None:
    """Templates write them as JSON; the text that the API has would be written as a text."""
    formatter = make(tmp_path, AGENT)
    dialog = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    dialog[1] |= {"refusal": None, "annotations": [], "provider_fields": {"refusal": None}}  # say nothing
    dialog.append({"role": "tool", "tool_call_id": "a1", "name": "now", "content": "noon"})
    text = formatter.tokenizer.decode(encode_dialog(formatter, dialog, {"tools": [TOOL]}))
    assert '"arguments": {"zone": "UTC", "n": [1, 2.5]}' in text and "noon (now)" in text


def test_what_a_template_does_not_write_is_refused(tmp_path: Path) -> None:
    formatter = make(tmp_path, CHATML)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert refusal(formatter, [USER, called, USER])[0] == "messages[1].tool_calls"
    assert refusal(formatter, [USER], tools=[TOOL])[0] == "tools"
    param, message = refusal(make(tmp_path, AGENT), [USER], chat_template_kwargs={"thinking": True})
    assert param == "chat_template_kwargs" and "'thinking'" in message and "enable_thinking" in message
    assert encode_dialog(make(tmp_path, AGENT), [USER], {"chat_template_kwargs": {"enable_thinking": False}})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({**USER, "colour": 1}, r"messages\[0\] has the unknown key 'colour'"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "unknown key 'refusal'"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}, r"content\[0\] has the .* 'cache'"),
        ({"role": "assistant", "content": "", "tool_calls": "x"}, "no list of calls"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}, r"tool_calls\[0\] is no call"),
        ({"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}, "unknown key 'index'"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]},
            "not the JSON text of an object",
        ),
    ],
)
def test_keys_that_nothing_reads_are_refused(server: Running, message: Any, words: str) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model="demo", messages=[message, USER], max_tokens=1)
