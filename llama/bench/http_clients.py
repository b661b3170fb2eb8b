"""The clients of a load, over HTTP: each is a thread. As a program of its own they take nothing from the server.

    python -m llama.bench.http_clients < JSON > JSON

It asks this package's `/v1/completions`. Knows HTTP, events and the clock; knows no model and no figures.
"""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..errors import LlamaError, to_one_line
from .asking import READ_BYTES, Address, read_events
from .load import Answer, LoadRequest, Range, ServeLoad

Piece = tuple[float, bytes]  # of an answer, with the moment when it came


@dataclass(frozen=True)
class HttpServing:
    """This package's server, with the clients in a process of their own."""

    open_server: Callable[[], AbstractContextManager[Address]]
    name: str = "http"

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        asked = {"load": asdict(load), "requests": [asdict(request) for request in requests]}
        with self.open_server() as address:
            words = [sys.executable, "-m", __name__]
            text = json.dumps({**asked, "address": address})
            done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.splitlines() or ["nothing was said"])[-1]
            raise LlamaError(f"the clients of --http ended: {to_one_line(said)}")
        return [Answer(**answer) for answer in json.loads(done.stdout)]


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    ranges = {name: Range(**asked["load"][name]) for name in ("prompt_range", "gen_range")}
    load = ServeLoad(**{**asked["load"], **ranges})
    requests = [LoadRequest(**request) for request in asked["requests"]]
    host, port = asked["address"]
    own = Endpoint("the server", "/v1/completions", write_body, read_moments)
    answers = ask_all(partial(own.ask, (host, port)), load, requests)
    json.dump([asdict(answer) for answer in answers], sys.stdout)


def ask_all(
    ask_one: Callable[[LoadRequest, float], Answer], load: ServeLoad, requests: Sequence[LoadRequest]
) -> list[Answer]:
    """The answers to a load. Each client is a thread; in an open loop, each request is a client of its own.

    ask_one: is given a request, and when the load started.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(load.clients if load.rate is None else len(requests)) as clients:
        return list(clients.map(lambda request: ask_one(request, start), requests))


@dataclass(frozen=True)
class Endpoint:
    """Where a server continues prompts, and how."""

    server: str  # its name, for messages
    path: str
    write_body: Callable[[LoadRequest], dict[str, Any]]
    read_moments: Callable[[Sequence[Piece]], list[float]]  # when each token was known to the client
    advice: str = ""  # at the end of messages

    def ask(self, address: Address, request: LoadRequest, start: float) -> Answer:
        """Send a request when it arrives, and note when each token comes. start: of the load, on the clock.

        Raises LlamaError if the answer isn't as long as was asked for.
        """
        try:
            submitted, pieces = send(address, self.path, self.write_body(request), request, start)
        except (OSError, http.client.HTTPException) as e:
            raise LlamaError(f"{self.server} doesn't answer: {to_one_line(e)}{self.advice}") from e
        moments = self.read_moments(pieces)
        if len(moments) != request.gen:
            said = to_one_line(b"".join(piece for _, piece in pieces)[-300:].decode(errors="replace"))
            raise LlamaError(
                f"{self.server} made {len(moments)} tokens, expected {request.gen}; it says {said}{self.advice}"
            )
        return Answer(submitted, moments)


def write_body(request: LoadRequest) -> dict[str, Any]:
    fixed = {"temperature": 0, "stream": True, "cache_prompt": False}
    return {"prompt": request.prompt, "max_tokens": request.gen, **fixed}


def send(
    address: Address, path: str, body: dict[str, Any], request: LoadRequest, start: float
) -> tuple[float, list[Piece]]:
    """Since when a client waits, and what it gets. start: of the load, on the clock.

    Nothing is parsed until all has come, so that the clients take little of the processor from the server.
    """
    text = json.dumps(body)
    if request.arrival is not None:
        time.sleep(max(start + request.arrival - time.perf_counter(), 0))
    submitted = time.perf_counter() - start if request.arrival is None else request.arrival
    connection, pieces = http.client.HTTPConnection(*address), list[Piece]()
    try:
        connection.request("POST", path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        while piece := response.read1(READ_BYTES):
            pieces.append((time.perf_counter() - start, piece))
    finally:
        connection.close()
    return submitted, pieces


def read_moments(pieces: Sequence[Piece]) -> list[float]:
    """When each token was known to the client: an event is a token, but for the mark at the end."""
    moments, rest = list[float](), b""
    for moment, piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        events = read_events(b"".join(block + b"\n\n" for block in blocks))
        moments += [moment for event in events if event != "[DONE]" and event.get("choices")]
    return moments


if __name__ == "__main__":
    main()
