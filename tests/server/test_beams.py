"""Beam search over HTTP: the answers are those of the library, and a search ends when its client has gone."""

import json
import socket
import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion
from running_server import Running

DIALOG: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_completion_equals_the_library(server: Running, client: OpenAI) -> None:
    prompts = ["The sea", "A friend is"]
    asked: dict[str, Any] = {"num_beams": 4, "repetition_penalty": 1.2}
    answer = client.completions.create(model="demo", prompt=prompts, n=2, max_tokens=9, extra_body=asked)
    Completion.model_validate(answer.model_dump(), strict=True, extra="forbid")
    found = server.llama.text_completion(prompts, 0, max_gen_len=9, num_return_sequences=2, **asked)
    assert [choice.text for choice in answer.choices] == [one["generation"] for one in found]
    assert [choice.finish_reason for choice in answer.choices] == [one["finish_reason"] for one in found]
    tokens = [server.llama.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    counted = server.llama.complete(tokens, 9, 0, num_return_sequences=2, **asked)
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, tokens))
    assert answer.usage.completion_tokens == sum(len(one.tokens) + (one.stop is not None) for one in counted)


def test_a_chat_equals_the_library(server: Running, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=DIALOG, n=3, max_tokens=12, extra_body={"num_beams": 3}
    )
    ChatCompletion.model_validate(answer.model_dump(), strict=True, extra="forbid")
    found = server.llama.chat_completion([DIALOG], 0, max_gen_len=12, num_beams=3, num_return_sequences=3)
    assert [choice.message.content for choice in answer.choices] == [one["generation"]["content"] for one in found]
    assert [choice.finish_reason for choice in answer.choices] == [one["finish_reason"] for one in found]
    one_beam = client.chat.completions.create(
        model="demo", messages=DIALOG, temperature=0, max_tokens=12, extra_body={"num_beams": 1}
    )
    assert one_beam.choices[0].message.content == "The capital of France is Paris."


@pytest.mark.parametrize("when", ["at the prompt", "at the answer"])
def test_a_client_that_goes_away_ends_its_search(server: Running, when: str) -> None:
    stops = {str(token): -100.0 for token in server.llama.tokenizer.stop_tokens}
    text = "The sea. " * (100 if when == "at the prompt" else 1)
    body = {"prompt": text, "max_tokens": 200, "num_beams": 16, "logit_bias": stops}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        deadline = time.monotonic() + 30
        while len(server.llama.engine.stepper.sequences) < (1 if when == "at the prompt" else 16):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    server.wait_until_idle()
    assert server.llama.engine.stepper.scheduler.running == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 3}, "n is 3 and num_beams 2"),
        ({"stream": True}, "stream goes without num_beams"),
        ({"temperature": 0.5}, "temperature 0.5: beams are the likeliest"),
        ({"top_p": 0.5}, "top_p goes without"),
        ({"seed": 1}, "seed goes without"),
        ({"stop": "."}, "stop goes without"),
        ({"logprobs": True}, "logprobs goes without"),
        ({"response_format": {"type": "json_object"}}, "response_format goes without"),
        ({"extra_body": {"num_beams": 17}}, "num_beams"),
        ({"extra_body": {"num_beams": 2, "top_k": 3}}, "top_k goes without"),
        ({"logit_bias": {"99999": 1}}, "logit_bias has token 99999"),
        ({"max_tokens": 5000}, "maximum context length"),
    ],
)
def test_what_a_search_does_not_take_is_refused(client: OpenAI, options: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": DIALOG, "extra_body": {"num_beams": 2}, **options}
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**asked)


@pytest.mark.parametrize("options", [{"best_of": 2}, {"echo": True}, {"logprobs": 0}])
def test_what_a_search_of_completions_does_not_take(client: OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{min(options)} goes without num_beams"):
        client.completions.create(model="demo", prompt="a", extra_body={"num_beams": 2}, **options)


def test_beams_can_not_be_forced_to_a_call(tool_server: Running) -> None:
    client = OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0)
    tools: Any = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
    with pytest.raises(openai.BadRequestError, match="tool_choice is none or auto with num_beams"):
        client.chat.completions.create(
            model="demo", messages=DIALOG, tools=tools, tool_choice="required", extra_body={"num_beams": 2}
        )
