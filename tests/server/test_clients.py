"""Clients of other projects, unmodified, as their own pages say to use them with another address."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, SecretStr
from running_server import Running

pytestmark = pytest.mark.slow
ASKED, ANSWER = "What is the capital of France?", "The capital of France is Paris."


class Weather(BaseModel):
    """It tells the weather."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def make_langchain(server: Running, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    url, key = f"{server.url}/v1", SecretStr("none")
    return ChatOpenAI(model="demo", base_url=url, api_key=key, temperature=0, max_retries=0, **options)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_answers_and_streams(server: Running, responses: bool) -> None:
    chat = make_langchain(server, use_responses_api=responses)
    answer = chat.invoke(ASKED)
    assert answer.text == ANSWER and answer.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream([("system", "Be short."), ("human", ASKED)]))
    assert (
        len(chunks) > 3
        and "".join(chunk.text for chunk in chunks) == chat.invoke([("system", "Be short."), ("human", ASKED)]).text
    )
    again = chat.invoke([("human", ASKED), answer, ("human", "And of Spain?")])
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0
    assert [one.text for one in chat.batch([ASKED, ASKED])] == [ANSWER, ANSWER]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_calls_tools(tool_server: Running, responses: bool) -> None:
    """A call, its result, and what the model then says; and an answer in a form."""
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = make_langchain(tool_server, use_responses_api=responses, max_completion_tokens=200)
    bound = chat.bind_tools([Weather], tool_choice="Weather")
    called = bound.invoke(ASKED)
    (call,) = called.tool_calls
    assert call["name"] == "Weather" and Weather.model_validate(call["args"])
    streamed = list(bound.stream(ASKED))
    assert [one["name"] for chunk in streamed for one in chunk.tool_call_chunks if one["name"]] == ["Weather"]
    result = ToolMessage("sunny", tool_call_id=call["id"])
    said = chat.bind_tools([Weather], max_completion_tokens=5).invoke([HumanMessage(ASKED), called, result])
    assert said.usage_metadata["output_tokens"] > 0
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Weather, method=method).invoke(ASKED), Weather)


def test_litellm(server: Running, tool_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    import litellm

    dialog = [{"role": "user", "content": ASKED}]
    asked: dict[str, Any] = {"model": "openai/demo", "api_key": "none", "messages": dialog}
    answer: Any = litellm.completion(**asked, api_base=f"{server.url}/v1", temperature=0)
    assert answer.choices[0].message.content == ANSWER and answer.usage.completion_tokens > 0
    chunks: Any = litellm.completion(**asked, api_base=f"{server.url}/v1", temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    function = {"name": "weather", "description": "It tells.", "parameters": Weather.model_json_schema()}
    asked |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 200}
    answer = litellm.completion(**asked, api_base=f"{tool_server.url}/v1")
    (call,) = answer.choices[0].message.tool_calls
    dialog += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again: Any = litellm.completion(**{**asked, "tool_choice": "auto"}, api_base=f"{tool_server.url}/v1")
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens
    words: Any = litellm.text_completion(
        model="text-completion-openai/demo", prompt="The sea", api_base=f"{server.url}/v1", api_key="none", max_tokens=4
    )
    assert words.choices[0].text


def test_llm(server: Running, tmp_path: Path) -> None:
    """The command `llm`, with the model in its file of models."""
    models = f"- model_id: here\n  model_name: demo\n  api_base: {server.url}/v1\n  api_key_name: here\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    (tmp_path / "keys.json").write_text('{"here": "none"}')

    def say(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        surroundings = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert say("-m", "here", ASKED, "-o", "temperature", "0") == ANSWER
    assert say("-m", "here", ASKED, "-o", "temperature", "0", "--no-stream", "-s", "Be short.")
    assert say("-c", "-m", "here", "And of Spain?", "-o", "max_tokens", "5")
