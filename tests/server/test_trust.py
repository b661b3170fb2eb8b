"""What a server does with clients that it doesn't know, that ask for too much, or that go away."""

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from running_server import Running
from tiny import ROOT, environment, launched

DIALOG = [{"role": "user", "content": "Tell me a story."}]
ENDLESS = {"messages": DIALOG, "max_tokens": 400, "logit_bias": {}, "stream": True}
StartServer = Callable[..., Running]


def ask(server: Running, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, JSON) of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def begin(server: Running, body: Any) -> socket.socket:
    """A connection whose request was sent, and the first bytes of whose answer have come."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    if body.get("stream"):
        assert connection.recv(64)
    return connection


def never_ending(server: Running) -> dict[str, Any]:
    """A request whose answer has no stop token."""
    stops = {str(token): -100.0 for token in server.llama.tokenizer.stop_tokens}
    return {**ENDLESS, "logit_bias": stops}


def test_key(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secre"}):
        status, _, body = ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 1}, **headers)
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 1}, **headers)[0] == 200
    with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_a_full_queue_is_told(start_server: StartServer) -> None:
    server = start_server(max_queue=2)
    open_ones = [begin(server, never_ending(server)) for _ in range(2)]
    status, headers, body = ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (status, headers["Retry-After"], body["error"]["code"]) == (429, "1", "queue_full")
    for connection in open_ones:
        connection.close()
    server.wait_until_idle()
    assert ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    assert ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 3})[0] == 400


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: Running, streams: bool) -> None:
    """While it is answered, and while it waits for its turn."""
    body = {**never_ending(server), "stream": streams}
    going = [begin(server, {**body, "stream": True}) for _ in range(4)]  # as many as there are rows
    waiting = begin(server, {**body, "stream": False})
    deadline = time.monotonic() + 30
    while len(server.llama.engine.stepper.sequences) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for connection in (*going, waiting):
        connection.close()
    server.wait_until_idle()
    assert server.llama.engine.stepper.scheduler.running == 0


def test_too_large(start_server: StartServer) -> None:
    server = start_server(max_body=1000)
    status, _, body = ask(server, "/v1/completions", {"prompt": "a" * 2000, "max_tokens": 1})
    assert status == 413 and body["error"]["code"] == "request_too_large"


def test_texts_to_embed_leave_room_for_others(server: Running) -> None:
    """Many of them are no queue that a chat waits behind; and they end when their client goes away."""
    server.wait_until_idle()
    body = json.dumps({"input": [[5 + i % 7] * 500 for i in range(400)]}).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 30
    while not server.llama.engine.stepper.sequences:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert len(server.llama.engine.stepper.sequences) <= server.llama.model.params.max_batch_size
    status, _, _ = ask(server, "/v1/chat/completions", {"messages": DIALOG, "max_tokens": 3, "temperature": 0})
    assert status == 200 and server.service.queue.open, "the chat was answered while texts are left"
    connection.close()
    server.wait_until_idle()


def test_numbers_that_json_has_not_are_refused(server: Running) -> None:
    tool = '{"type": "function", "name": "f", "parameters": {"const": %s}}'
    for number in ("1e400", "NaN", "-Infinity"):
        body = '{"input": "x", "max_output_tokens": 2, "tool_choice": "none", "tools": [' + tool % number + "]}"
        status, _, answer = ask(server, "/v1/responses", body.encode())
        assert status == 400 and "number" in answer["error"]["message"]


def test_a_chunked_body_that_is_too_large(start_server: StartServer) -> None:
    server = start_server(max_body=10_000)
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(3):
        connection.sendall(b"1388\r\n" + b" " * 5000 + b"\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b'{"messages": "\xff"}', b"1" * 5000])
def test_what_is_no_json_is_told(server: Running, body: bytes) -> None:
    status, _, answer = ask(server, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] != "not_found"


def test_paths_that_nobody_has_leave_no_trace(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a line of their own in the log, nor a series in the metrics."""
    port = int(server.url.rsplit(":", 1)[1])
    with caplog.at_level("INFO", "llama.server"):
        for number in range(3):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            head = f"POST /made-up-{number}%0aFORGED HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 413")
            connection.close()
        deadline = time.monotonic() + 30
        while len(lines := [r.getMessage() for r in caplog.records if "made-up" in r.getMessage()]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not any("\n" in line for line in lines)
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        assert b"made-up" not in answer.read()


def test_schemes_of_the_key(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    for value, status in (("bearer secret", 200), ("Bearer secret", 200), ("secret", 401), ("Basic secret", 401)):
        assert ask(server, "/tokenize", {"prompt": "a"}, Authorization=value)[0] == status


def test_an_answer_that_takes_too_long(start_server: StartServer) -> None:
    server = start_server(timeout=0.2)
    status, _, body = ask(server, "/v1/chat/completions", {**never_ending(server), "stream": False})
    assert status == 504 and body["error"]["code"] == "timeout"
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b"\xff\xfe", 400),
        ("/v1/completions", b'{"prompt": ' + b"[" * 10_000, 400),
        ("/v1/completions", {"prompt": []}, 400),
        ("/v1/completions", {"prompt": [[]]}, 400),
        ("/v1/completions", {"prompt": [99999999]}, 400),
        ("/v1/completions", {"prompt": "a", "seed": 1 << 70}, 200),
        ("/v1/completions", {"prompt": "a" * 100_000}, 400),
        ("/v1/embeddings", {"input": ""}, 400),
        ("/v1/embeddings", {"input": "a " * 2000}, 400),
        ("/detokenize", {"tokens": [1 << 40]}, 400),
        ("/tokenize", {}, 400),
        ("/tokenize", b'{"prompt": "half of a character: \\ud83d"}', 400),
        ("/v1/chat/completions", b'{"messages": [{"role\xed\xa0\x80": "user", "content": "a"}]}', 400),
        ("/v1/responses", {"input": [{"role": "user", "content": "a", "type": ["message"]}]}, 400),
        ("/nothing", {}, 404),
    ],
)
def test_bodies_of_all_kinds(server: Running, path: str, body: Any, status: int) -> None:
    found, _, answer = ask(server, path, body)
    assert found == status, answer
    assert status == 200 or {"message", "type", "param", "code"} == answer["error"].keys()


def test_metrics(server: Running) -> None:
    ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 3})
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert 'llama_requests_total{path="/v1/completions",status="200"}' in text
    assert "llama_generated_tokens_total" in text and "llama_first_token_seconds_bucket" in text


def test_cors_only_where_it_was_asked_for(server: Running, start_server: StartServer) -> None:
    origin = {"Origin": "http://page"}
    _, headers, _ = ask(server, "/tokenize", {"prompt": "a"}, **origin)
    assert "access-control-allow-origin" not in headers
    _, headers, _ = ask(start_server(cors_origin="http://page"), "/tokenize", {"prompt": "a"}, **origin)
    assert headers["access-control-allow-origin"] == "http://page"


def test_the_command(tmp_path: Any) -> None:
    """It says where it listens, answers, logs a line without the prompt, and SIGTERM ends it."""
    command = ["-m", "llama", "serve", "--port", "0", "--device", "cpu", "--max_seq_len", "256"]
    process = subprocess.Popen(launched(*command), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "serving demo at" not in (line := process.stderr.readline()):
        assert line, "the server has ended"
    server = Running(line.split(" at ")[1].split("/v1")[0], None)  # type: ignore[arg-type]
    assert ask(server, "/v1/completions", {"prompt": "a private text", "max_tokens": 2})[0] == 200
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert "POST /v1/completions 200" in said and "private" not in said
    assert process.returncode in (0, -signal.SIGTERM)
