"""The official client, unmodified, and what the engine answers by itself."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running_server import Running

DIALOG: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def validate(kind: Any, answer: Any) -> None:
    """Raise unless the answer has just the fields of the client's type, of just their types."""
    kind.model_validate(answer.model_dump(), strict=True, extra="forbid")


def test_a_chat_equals_the_library(server: Running, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=DIALOG, temperature=0, max_tokens=20)
    validate(ChatCompletion, answer)
    (expected,) = server.llama.chat_completion([DIALOG], temperature=0, max_gen_len=20)
    (choice,) = answer.choices
    assert choice.message.content == expected["generation"]["content"] == "The capital of France is Paris."
    assert choice.finish_reason == "stop" and answer.usage is not None
    prompt = server.llama.formatter.encode_dialog_prompt(DIALOG)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chunks(client: OpenAI) -> None:
    """First the role, then content, an empty delta with the reason, the usage alone; one id and time for all."""
    options: Any = {"messages": DIALOG, "temperature": 0, "max_tokens": 20, "seed": 1, "n": 2}
    whole = client.chat.completions.create(model="demo", **options)
    stream = client.chat.completions.create(
        model="demo", stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    for chunk in chunks:
        validate(ChatCompletionChunk, chunk)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert own[-1].delta.content is None and own[-1].delta.role is None
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not chunks[-1].choices and whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs(server: Running, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=DIALOG, temperature=0, max_tokens=9, logprobs=True, top_logprobs=3
    )
    validate(ChatCompletion, answer)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    prompt = server.llama.formatter.encode_dialog_prompt(DIALOG)
    (expected,) = server.llama.complete([prompt], 9, 0, logprobs=True, top_logprobs=3)
    assert [one.logprob for one in logprobs.content] == pytest.approx(expected.logprobs, abs=1e-5)
    assert expected.top_logprobs is not None
    for one, token, best in zip(logprobs.content, expected.tokens, expected.top_logprobs, strict=True):
        assert bytes(one.bytes or []) == server.llama.tokenizer.decode_bytes(token)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx([p for _, p in best], abs=1e-5)
    text = b"".join(bytes(one.bytes or []) for one in logprobs.content).decode()
    assert text == answer.choices[0].message.content


@pytest.mark.parametrize("prompt", ["The sea", ["The sea", "A friend"], "ids", "lists of ids"])
def test_completions(server: Running, client: OpenAI, prompt: Any) -> None:
    tokenizer = server.llama.tokenizer
    ids = [tokenizer.encode(text, bos=True, eos=False) for text in ("The sea", "A friend")]
    prompt = {"ids": ids[0], "lists of ids": ids}.get(prompt if isinstance(prompt, str) else "", prompt)
    answer = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=7)
    validate(Completion, answer)
    expected = server.llama.text_completion(["The sea", "A friend"], 0, max_gen_len=7)[: len(answer.choices)]
    assert [choice.text for choice in answer.choices] == [one["generation"] for one in expected]
    chunks = list(client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=7, stream=True))
    for i, choice in enumerate(answer.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(one.text for one in own) == choice.text and own[-1].finish_reason == choice.finish_reason


def test_echo_with_logprobs_as_evaluations_send_it(server: Running, client: OpenAI) -> None:
    """The prompt's own tokens, the likeliest in their places, and none generated."""
    text = "The sea is wide and salty"
    answer = client.completions.create(model="demo", prompt=text, echo=True, logprobs=2, max_tokens=0, temperature=0)
    (choice,), (score,) = answer.choices, server.llama.score([text])
    assert choice.text == text and answer.usage is not None and answer.usage.completion_tokens == 0
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is None  # as the API has it, though not the client's type
    assert logprobs.token_logprobs[1:] == pytest.approx(score.logprobs[1:], abs=1e-5)
    likeliest = [max(best.values()) for best in logprobs.top_logprobs[1:]]
    assert all(best >= own - 1e-6 for best, own in zip(likeliest, logprobs.token_logprobs[1:], strict=True))
    assert logprobs.text_offset is not None and logprobs.tokens is not None
    assert all(text[o:].startswith(t) for o, t in zip(logprobs.text_offset[1:], logprobs.tokens[1:], strict=True))


def test_best_of(server: Running, client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The sea", best_of=4, n=2, seed=3, max_tokens=6)
    prompt = server.llama.tokenizer.encode("The sea", bos=True, eos=False)
    best = server.llama.complete([prompt], 6, 1.0, 1.0, best_of=4, n=2, seed=3)
    assert [choice.text for choice in answer.choices] == [one.text for one in best]


def test_settings_are_those_of_the_library(server: Running, client: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "presence_penalty": 0.5}
    options |= {"frequency_penalty": 0.4, "stop": [" and", "."]}
    beside = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.completions.create(
        model="demo", prompt="The sea", max_tokens=12, logit_bias={"300": -5}, extra_body=beside, **options
    )
    beside |= {"logit_bias": {300: -5}}
    (expected,) = server.llama.text_completion(["The sea"], max_gen_len=12, **options, **beside)
    assert answer.choices[0].text == expected["generation"]


def test_embeddings(server: Running, client: OpenAI) -> None:
    """The client asks for base64 by itself."""
    answer = client.embeddings.create(model="demo", input=["the sea", "a friend"])
    expected = server.llama.embed(["the sea", "a friend"])
    for one, vector in zip(answer.data, expected, strict=True):
        assert one.embedding == pytest.approx(vector.tolist(), abs=1e-4)
    plain = client.embeddings.create(model="demo", input="the sea", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(expected[0].tolist(), abs=1e-4)


def test_models_and_tokens(server: Running, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    ids = server.llama.tokenizer.encode("The sea", bos=True, eos=False)
    assert post(server, "/tokenize", {"prompt": "The sea"})["tokens"] == ids
    dialog = post(server, "/tokenize", {"messages": DIALOG})["tokens"]
    assert dialog == server.llama.formatter.encode_dialog_prompt(DIALOG)
    assert post(server, "/detokenize", {"tokens": ids[1:]})["prompt"] == "The sea"


def post(server: Running, path: str, body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_many_at_once(server: Running) -> None:
    """Each answer is the one that it is alone, however many more than the model has rows are asked for."""
    prompts = [f"The {word} is" for word in ("sea", "sky", "river", "cat", "sun", "dog", "tree", "house", "king")]
    expected = [one["generation"] for one in server.llama.text_completion(prompts, 0, max_gen_len=16)]

    async def ask_all() -> list[str]:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def ask(prompt: str) -> str:
            stream = await client.completions.create(
                model="demo", prompt=prompt, temperature=0, max_tokens=16, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(ask, prompts))

    assert asyncio.run(ask_all()) == expected


def test_the_next_message_reuses_the_conversation(client: OpenAI) -> None:
    dialog = [*DIALOG, {"role": "assistant", "content": "The capital of France is Paris."}]
    client.chat.completions.create(model="demo", messages=DIALOG, temperature=0, max_tokens=20)
    again = client.chat.completions.create(
        model="demo", messages=[*dialog, {"role": "user", "content": "And of Spain?"}], temperature=0, max_tokens=4
    )
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 12
    without = client.chat.completions.create(
        model="demo", messages=DIALOG, max_tokens=4, extra_body={"cache_prompt": False}
    )
    assert without.usage is not None and without.usage.prompt_tokens_details is not None
    assert without.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_body": {"foo": 1}}, "Unrecognized request argument supplied: foo"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"temperature": "1"}}, "temperature"),
        ({"max_tokens": 100_000}, "maximum context length is 512 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options goes with stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias has 'x'"),
        ({"logit_bias": {"99999": 1}}, "logit_bias has token 99999"),
        ({"stop": ""}, "stop is"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": []}, "messages|dialog"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "colour"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client: OpenAI, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": DIALOG, **options})
    assert caught.value.body is not None and caught.value.type == "invalid_request_error"


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist"):
        client.chat.completions.create(model="gpt-4", messages=DIALOG)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("responses", {"input": "a", "max_output_tokens": 9000}, "max_output_tokens", "context length"),
        ("responses", {"input": []}, "input", ""),
        ("responses", {"input": "a", "truncation": "auto"}, "truncation", "leave it out"),
        ("embeddings", {"input": []}, "input", "input is empty"),
        ("embeddings", {"input": [99999]}, "input", "99999"),
        ("completions", {"prompt": {}}, "prompt", "valid string; or: .* valid list"),
        ("completions", {"prompt": "a", "suffix": "y"}, "suffix", "leave it out"),
        ("completions", {"prompt": "a", "stop": ""}, "stop", "stop is"),
        ("completions", {"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ("completions", {"prompt": [99999]}, "prompt", "99999"),
        ("completions", {"prompt": ["a"] * 300}, "prompt", "300 answers"),
        ("chat/completions", {"messages": DIALOG, "store": True}, "store", "send false"),
        ("chat/completions", {"messages": DIALOG, "response_format": {"type": "x"}}, "response_format", ""),
        ("chat/completions", {"messages": "a"}, "messages", "valid list"),
    ],
)
def test_errors_name_the_field_that_was_sent(server: Running, path: str, body: Any, param: str, words: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, f"/v1/{path}", body)
    error = json.load(caught.value)["error"]
    assert caught.value.code == 400 and error["param"] == param and re.search(words, error["message"]), error
    told = {"suffix": "unsupported_parameter", "store": "unsupported_parameter", "truncation": "unsupported_parameter"}
    assert error["code"] == told.get(param, error["code"])


def test_a_body_that_is_not_called_json_is_refused_for_that(server: Running) -> None:
    request = urllib.request.Request(f"{server.url}/v1/completions", b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert json.load(caught.value)["error"]["message"] == "Content-Type must be application/json"


def test_a_format_that_asks_for_nothing_goes_with_beams(server: Running) -> None:
    asked = {"messages": DIALOG, "num_beams": 2, "max_tokens": 4, "response_format": {"type": "text"}}
    assert post(server, "/v1/chat/completions", asked)["choices"][0]["message"]["content"]


def test_null_is_as_if_nothing_was_sent(server: Running) -> None:
    bodies: dict[str, Any] = {
        "/v1/embeddings": {"input": "a", "encoding_format": None},
        "/v1/completions": {"prompt": "a", "max_tokens": 1, "cache_prompt": None},
        "/tokenize": {"prompt": "a", "add_special_tokens": None},
    }
    for path, body in bodies.items():
        assert httpx2.post(server.url + path, json=body).status_code == 200
    body = {"messages": DIALOG, "add_special_tokens": False}
    assert httpx2.post(server.url + "/tokenize", json=body).status_code == 400


def test_probes_may_ask_for_heads(server: Running) -> None:
    for path in ("/", "/health"):
        answer = httpx2.head(server.url + path)
        assert answer.status_code == 200 and not answer.content
