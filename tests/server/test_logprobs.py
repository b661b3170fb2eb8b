"""Logprobs of answers: the same tokens, in the same places, whole and streamed."""

from typing import Any

import pytest
from openai import OpenAI
from running_server import Running

DIALOG: Any = [{"role": "user", "content": "What is the capital of France?"}]
FIELDS = ("tokens", "token_logprobs", "text_offset", "top_logprobs")


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete_both(client: OpenAI, **asked: Any) -> tuple[Any, list[Any]]:
    """The choice as a whole, and its chunks; their texts and logprobs agree."""
    asked = {"model": "demo", "temperature": 0, **asked}
    whole = client.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **asked) if chunk.choices]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    for field in FIELDS[:3] if whole.logprobs else ():
        streamed = [one for chunk in chunks if chunk.logprobs for one in getattr(chunk.logprobs, field)]
        assert (
            streamed == pytest.approx(getattr(whole.logprobs, field), abs=1e-5)
            if "prob" in field
            else (streamed == getattr(whole.logprobs, field))
        )
    return whole, chunks


@pytest.mark.parametrize("stop", ["ital of Fr", "is", "zzz"])
def test_tokens_of_a_stop_have_no_logprobs(client: OpenAI, stop: str) -> None:
    asked: Any = {"model": "demo", "messages": DIALOG, "temperature": 0, "max_tokens": 9, "logprobs": True}
    asked["stop"] = [stop]
    choice = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = [one.token for one in choice.logprobs.content]
    streamed = [one.token for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content or []]
    assert streamed == tokens and choice.message.content is not None
    assert tokens and choice.message.content.startswith("".join(tokens))
    complete_both(client, prompt="The sea", stop=[stop, " and"], logprobs=1, max_tokens=12)


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_where_a_character_has_several_tokens(server: Running, client: OpenAI, echo: bool) -> None:
    ids = server.llama.tokenizer.encode("\U0001f600\u00e9", bos=False, eos=False)
    assert len(ids) > 2
    bias = {str(token): 100 for token in ids}
    asked: Any = {"echo": True} if echo else {"logit_bias": bias}
    whole, _ = complete_both(client, prompt="a\U0001f600\u00e9b", logprobs=0, max_tokens=6, **asked)
    offsets = whole.logprobs.text_offset
    assert offsets == sorted(offsets) and offsets[-1] <= len(whole.text)
    if echo:
        end = len(server.llama.tokenizer.encode("a\U0001f600\u00e9b", bos=True, eos=False))
        assert whole.text[offsets[end - 1]] == "b"


@pytest.mark.parametrize("logprobs", [None, 0])
def test_an_echo_alone_ends(client: OpenAI, logprobs: int | None) -> None:
    asked: Any = {"prompt": "The sea", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    whole, _ = complete_both(client, **asked)
    assert (whole.text, whole.finish_reason) == ("The sea", "length")
    *_, last = client.completions.create(model="demo", stream=True, stream_options={"include_usage": True}, **asked)
    assert last.usage is not None and last.usage.completion_tokens == 0
    assert last.usage.total_tokens == last.usage.prompt_tokens


def test_a_prompt_that_fills_the_context_can_be_scored(client: OpenAI) -> None:
    whole, _ = complete_both(client, prompt=[300] * 512, echo=True, max_tokens=0, logprobs=0)
    assert len(whole.logprobs.tokens) == 512 and whole.finish_reason == "length"


@pytest.mark.parametrize("most", [0, 1, 3])
def test_the_likeliest_tokens_have_the_one_that_was_drawn(client: OpenAI, most: int) -> None:
    answer = client.completions.create(model="demo", prompt="The sea", temperature=2, logprobs=most, max_tokens=12)
    logprobs: Any = answer.choices[0].logprobs
    for token, own, best in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert best[token] == own and max(most, 1) <= len(best) <= most + 1
