"""Clients that leave while they are answered, while their prompt is read, or while they wait: others notice nothing."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from running_server import Running, build, start
from served import Served, events, serving
from tiny import write_checkpoint

from llama import Llama
from llama.engine.sequence import Sequence

ROWS, MOST_STEPS = 2, 2
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
LONG = " ".join(str(i) for i in range(80))


@pytest.fixture(scope="module")
def slow_reader() -> Iterator[Running]:
    """A server that reads prompts in small pieces, and answers two at a time."""
    with ExitStack() as stack:
        yield start(stack, build(max_batch_size=ROWS, prefill_chunk=8))


def write_body(path: str, text: str, tokens: int, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "demo", "stream": stream, "temperature": 0}
    if path == "/v1/completions":
        return {**body, "prompt": text, "max_tokens": tokens}
    if path == "/v1/responses":
        return {**body, "input": text, "max_output_tokens": tokens}
    return {**body, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def send(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection whose request was sent."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


class Steps:
    """The engine's steps, from when on it was told that a sequence is not wanted."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch):
        self._engine, self.count = server.llama.engine, 0
        self.cancelled: dict[int, int] = {}  # the number of the step before, by key
        self.freed: dict[int, int] = {}
        self.answered: dict[int, int] = {}  # tokens that it had got by then
        carry_out, cancel = self._engine.stepper.carry_out, self._engine.cancel

        def count_step(commands: Any) -> None:
            carry_out(commands)
            self.count += 1
            for key in self.cancelled:
                if key not in self._engine.stepper.sequences:
                    self.freed.setdefault(key, self.count)

        def note_cancelled(sequence: Sequence) -> None:
            if not sequence.is_over:
                self.cancelled.setdefault(sequence.key, self.count)
                self.answered.setdefault(sequence.key, len(sequence.answer))
            cancel(sequence)

        monkeypatch.setattr(self._engine.stepper, "carry_out", count_step)
        monkeypatch.setattr(self._engine, "cancel", note_cancelled)

    def wait_for(self, sequences: int) -> None:
        deadline = time.monotonic() + 30
        while len(self._engine.stepper.sequences) != sequences:
            assert time.monotonic() < deadline, f"{len(self._engine.stepper.sequences)} sequences, not {sequences}"
            time.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("when", ["reading", "waiting"])
def test_a_slot_is_free_within_two_steps(
    slow_reader: Running, monkeypatch: pytest.MonkeyPatch, when: str, path: str, stream: bool
) -> None:
    """And whoever is answered beside it gets what it gets alone."""
    (expected,) = slow_reader.llama.text_completion(["The sea"], 0, max_gen_len=200, logit_bias=no_stops(slow_reader))
    steps = Steps(slow_reader, monkeypatch)
    beside = {**write_body("/v1/completions", "The sea", 200, False)}
    beside["logit_bias"] = {str(token): bias for token, bias in no_stops(slow_reader).items()}
    with ThreadPoolExecutor() as threads:
        count = 1 if when == "reading" else ROWS
        asked = [threads.submit(read, send(slow_reader.url, "/v1/completions", beside)) for _ in range(count)]
        steps.wait_for(count)
        leaving = send(slow_reader.url, path, write_body(path, LONG, 50, stream))
        steps.wait_for(count + 1)
        leaving.close()
        answers = [json.loads(answer.result(60)) for answer in asked]
    slow_reader.wait_until_idle()
    assert [answer["choices"][0]["text"] for answer in answers] == [expected["generation"]] * count
    (key,) = steps.cancelled
    assert steps.freed[key] - steps.cancelled[key] <= MOST_STEPS
    assert steps.answered[key] == 0 or when == "reading"


def no_stops(server: Running) -> dict[int, float]:
    return dict.fromkeys(server.llama.tokenizer.stop_tokens, -100.0)


def read(connection: socket.socket) -> bytes:
    """The body of an answer that isn't streamed."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += connection.recv(65536)
    connection.close()
    return body


# --- on ranks ---------------------------------------------------------------------------------------------------------

HUGE = "a very long text " * 700  # over 11,000 tokens of bytes
REFUSED: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a" * 20_000}]},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "regex", "regex": "("}},
    {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"99999": 1}},
    {"messages": []},
]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Llama]]:
    directory = write_checkpoint(tmp_path_factory.mktemp("tiny"), endless=True)
    alone = Llama.build(directory, max_seq_len=16384, max_batch_size=4, device="cpu", dtype="float32")
    with serving(directory, tmp_path_factory.mktemp("log") / "log", "--model_name", "demo", ranks=2) as served:
        yield served, alone


def test_whatever_others_do_an_answer_is_what_it_is_alone(on_ranks: tuple[Served, Llama]) -> None:
    """They leave while their prompts are read, while they are answered, while they wait; and ask for what can't be."""
    served, alone = on_ranks
    (expected,) = alone.text_completion(["The sea"], 0, max_gen_len=400)
    is_over = threading.Event()

    def disturb(number: int) -> None:
        while not is_over.is_set():
            path, stream = PATHS[number % len(PATHS)], number % 2 == 0
            text = HUGE if number % 3 == 0 else "What is it?"
            connection = send(served.url, path, write_body(path, f"{number} {text}", 2000, stream))
            time.sleep(0.05 * (number % 7))
            connection.close()
            with served.client() as client:
                response = client.post("/v1/chat/completions", json=REFUSED[number % len(REFUSED)])
            assert 400 <= response.status_code < 500, response.text
            number += 5

    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(disturb, number) for number in range(5)]
        body = {**write_body("/v1/completions", "The sea", 400, True)}
        with served.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            text = "".join(event["choices"][0]["text"] for event in events(response) if event != "[DONE]")
        is_over.set()
        for other in others:
            other.result(60)
    assert text == expected["generation"]
    served.wait_until_open(0)


def test_many_that_wait_leave_at_once(on_ranks: tuple[Served, Llama]) -> None:
    served, alone = on_ranks
    body = write_body("/v1/chat/completions", "Tell me all.", 16_000, True)
    connections = [send(served.url, "/v1/chat/completions", body) for _ in range(20)]
    served.wait_until_open(20)
    for connection in connections:
        connection.close()
    served.wait_until_open(0)
    (expected,) = alone.text_completion(["A friend"], 0, max_gen_len=10)
    with served.client() as client:
        answer = client.post("/v1/completions", json=write_body("/v1/completions", "A friend", 10, False)).json()
    assert answer["choices"][0]["text"] == expected["generation"]


def test_a_text_that_is_embedded_and_a_search_beside_answers(on_ranks: tuple[Served, Llama]) -> None:
    served, alone = on_ranks
    with served.client() as client, ThreadPoolExecutor() as threads:
        stream = threads.submit(
            client.post, "/v1/completions", json=write_body("/v1/completions", "The sea", 300, False)
        )
        vector = client.post("/v1/embeddings", json={"input": HUGE[:4000]}).json()["data"][0]["embedding"]
        asked = {**write_body("/v1/completions", "A friend", 8, False), "num_beams": 3}
        found = client.post("/v1/completions", json=asked).json()
        text = stream.result(60).json()["choices"][0]["text"]
    assert vector == pytest.approx(alone.embed([HUGE[:4000]])[0].tolist(), abs=1e-4)
    assert (
        found["choices"][0]["text"]
        == alone.text_completion(["A friend"], 0, max_gen_len=8, num_beams=3)[0]["generation"]
    )
    assert text == alone.text_completion(["The sea"], 0, max_gen_len=300)[0]["generation"]
