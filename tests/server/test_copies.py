"""Copies of a model behind one port, of one rank and of two: answers, conversations, load, limits, and who leaves."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from served import Served, events, serving
from tiny import write_checkpoint

from llama import Llama

KEY = "secret"
MOST = 16  # answers in the queue
WORDS = ("sea", "sky", "river", "cat", "sun", "dog", "tree", "house")
PROMPTS = [f"Of the {word} and what it is" for word in WORDS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), endless=True)


ONE_RANK = pytest.param(1, id="one rank a copy")
TWO_RANKS = pytest.param(2, id="two ranks a copy", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[ONE_RANK, TWO_RANKS])
def served(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    options = ("--model_parallel_size", str(request.param), "--model_name", "tiny", "--api_key", KEY)
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(directory, log, *options, "--max_queue", str(MOST), ranks=2 * request.param) as one:
        yield one


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def alone(directory: Path) -> Llama:
    return Llama.build(directory, max_seq_len=16384, max_batch_size=4, device="cpu", dtype="float32")


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "seeded"])
def test_answers_are_those_of_one_copy(served: Served, alone: Llama, settings: dict[str, Any]) -> None:
    """Streamed or not; and both copies have their share."""
    expected = [one["generation"] for one in alone.text_completion(PROMPTS, top_p=1.0, max_gen_len=12, **settings)]
    before = served.metrics()

    async def ask_all() -> list[str]:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)

        async def ask(prompt: str, streams: bool) -> str:
            options: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 12, **settings}
            if not streams:
                return (await client.completions.create(**options)).choices[0].text
            stream = await client.completions.create(stream=True, **options)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(ask(prompt, i % 2 == 0) for i, prompt in enumerate(PROMPTS)))

    assert asyncio.run(ask_all()) == expected
    name = 'llama_generated_tokens_total{copy="%d"}'
    shares = [served.metrics()[name % copy] - before[name % copy] for copy in (0, 1)]
    assert min(shares) > sum(shares) / 4


def test_a_conversation_stays_with_its_copy(client: OpenAI) -> None:
    """Each message begins at all that was computed for the one before, whatever else is asked in between."""
    dialogs: list[list[Any]] = [[{"role": "user", "content": f"{word}? Tell me of it."}] for word in WORDS[:5]]
    lengths = [0] * len(dialogs)
    for turn in range(3):
        for i, dialog in enumerate(dialogs):
            answer = client.chat.completions.create(model="tiny", messages=dialog, temperature=0, max_tokens=8)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            cached = answer.usage.prompt_tokens_details.cached_tokens or 0
            assert turn == 0 or cached >= lengths[i]
            lengths[i] = answer.usage.prompt_tokens - 40  # the template's end is not the next one's
            dialog += [answer.choices[0].message.model_dump(include={"role", "content"}), dialog[0]]


def test_every_endpoint(served: Served, client: OpenAI, alone: Llama) -> None:
    """Twice, so that each copy answers."""
    claude = anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0)
    dialog: Any = [{"role": "user", "content": "What is it?"}]
    (expected,) = alone.chat_completion([dialog], temperature=0, max_gen_len=6)
    options: Any = {"model": "tiny", "messages": dialog, "max_tokens": 6}
    with served.client(headers={"Authorization": f"Bearer {KEY}"}) as plain:
        for _ in range(2):
            message = claude.messages.create(**options, extra_body={"temperature": 0})
            assert [block.text for block in message.content if block.type == "text"] == [
                expected["generation"]["content"]
            ]
            with claude.messages.stream(**options, extra_body={"temperature": 0}) as stream:
                assert "".join(stream.text_stream) == expected["generation"]["content"]
            vector = client.embeddings.create(model="tiny", input="the sea").data[0].embedding
            assert vector == pytest.approx(alone.embed(["the sea"])[0].tolist(), abs=1e-4)
            tokens = plain.post("/tokenize", json={"prompt": "The sea"}).json()["tokens"]
            assert plain.post("/detokenize", json={"tokens": tokens[1:]}).json()["prompt"] == "The sea"
            assert [model.id for model in client.models.list()] == ["tiny"]
        assert plain.get("/health").json() == {"status": "ok", "copies": ["ok", "ok"]}


def test_mistakes_are_told_by_each_copy(client: OpenAI) -> None:
    for i in range(4):
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(model="tiny", prompt=f"{i} " * 9000)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=f"other {i}", prompt=f"{i}")


def test_who_has_no_key_gets_nothing(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{served.url}/v1", api_key="other", max_retries=0).completions.create(model="tiny", prompt="a")


def test_the_queue_is_that_of_all_copies_and_clients_that_leave_make_room(served: Served) -> None:
    """Twice as many answers are under way as one copy has rows; the others wait for their turn."""
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(served.client(headers={"Authorization": f"Bearer {KEY}"}))
        body = {
            "messages": [{"role": "user", "content": "Tell me all."}],
            "max_tokens": 16000,
            "stream": True,
            "temperature": 0,
        }
        responses = [stack.enter_context(one.stream("POST", "/v1/chat/completions", json=body)) for _ in range(MOST)]
        streams = [events(response) for response in responses]  # a client that lets go of one leaves
        assert all(next(stream)["choices"] for stream in streams)
        served.wait_until_open(MOST)
        shares = [served.metrics()[f'llama_open_answers{{copy="{copy}"}}'] for copy in (0, 1)]
        assert max(shares) - min(shares) <= 2
        refused = one.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        too_many = one.post("/v1/completions", json={"prompt": "a", "n": MOST + 1})
        assert too_many.status_code == 400
    served.wait_until_open(0)
    with served.client(headers={"Authorization": f"Bearer {KEY}"}) as one:
        assert one.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
