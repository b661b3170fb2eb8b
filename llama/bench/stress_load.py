"""Many clients at once, of whom a third go away at random moments: what they get is what each gets alone.

Knows the endpoints' bodies and answers; knows no model.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from threading import Event, Lock
from typing import Any

from ..errors import LlamaError, to_one_line
from .asking import Address, Reply, ask, get

QUESTIONS = ["What is the capital of {}?", "Tell me about {}.", "I am going to {}, what should I see?", "{}"]
PLACES = ["France", "Italy", "Paris", "Rome", "Japan", "the sea", "a pancake", "Spain", "Peru", "blue"]
SHARE_LEAVING = 0.4  # of the clients want to leave; some have their answer before, so that about a third do
SECONDS_TO_FREE = 30.0  # after the last client, until no answer is open
OPEN_ANSWERS = re.compile(rb"^llama_open_answers(?:\{.*\})? ([\d.]+)", re.MULTILINE)
WRITTEN = re.compile(rb'"content":"[a-z]')  # in an event
LETTERS = 120  # of an answer that holds its slot for a while


@dataclass(frozen=True)
class LoadFigures:
    """What came of a load."""

    requests: int
    clients: int  # at once
    left: int  # requests whose clients went away before the end
    lost: int  # requests that got no whole answer though their clients stayed
    mixed_up: int  # answers that are not, or do not begin as, what the same request gets alone
    open_answers: int  # that the server still has after all that
    free_slots: int  # answers that go on at once after all that
    slots: int
    seconds: float

    @property
    def faults(self) -> list[str]:
        found = {"requests lost": self.lost, "answers mixed up": self.mixed_up, "answers left open": self.open_answers}
        faults = [f"{number} {name}" for name, number in found.items() if number]
        return faults + [f"{self.slots - self.free_slots} slots leaked"] * (self.free_slots != self.slots)


@dataclass(frozen=True)
class Asked:
    """A request that is sent many times."""

    path: str
    body: dict[str, Any]

    def dump(self, streams: bool) -> bytes:
        return json.dumps({**self.body, "stream": streams}).encode()


def draw_requests(count: int, seed: int) -> list[Asked]:
    """Different requests of three endpoints, whose answers are drawn at random from their seeds."""
    rng, requests = random.Random(seed), list[Asked]()
    for number in range(count):
        text = rng.choice(QUESTIONS).format(rng.choice(PLACES))
        asked: dict[str, Any] = {"max_tokens": rng.randint(1, 32)}
        dialog = [{"role": "user", "content": text}]
        if number % 4 == 3:  # this protocol has no seed
            requests.append(Asked("/v1/messages", {"model": "demo", "messages": dialog, "temperature": 0, **asked}))
            continue
        asked |= {"seed": rng.randrange(1000), "temperature": rng.choice([0, 0.8, 1.2]), "n": rng.randint(1, 2)}
        if number % 4 == 2:
            requests.append(Asked("/v1/completions", {"prompt": text, **asked}))
        else:
            requests.append(Asked("/v1/chat/completions", {"messages": dialog, **asked}))
    return requests


def read_texts(reply: Reply, path: str) -> dict[int, str]:
    """The text of each answer in a reply, whole or streamed, so far as it came."""
    is_stream = reply.body.startswith((b"data: ", b"event: "))
    if path == "/v1/messages":
        if not is_stream:
            return {0: "".join(block["text"] for block in reply.read()["content"])}
        return {0: "".join(event["delta"].get("text", "") for event in reply.events if "delta" in event)}
    texts: dict[int, str] = {}
    for event in reply.events if is_stream else [reply.read()]:
        for choice in event["choices"] if isinstance(event, dict) else []:
            piece = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


def read_begun(reply: Reply, path: str) -> dict[int, str]:
    """The texts of a reply that may have no end."""
    is_stream = reply.status == 200 and reply.body.startswith((b"data: ", b"event: "))
    return read_texts(reply, path) if is_stream else {}


def is_answered(reply: Reply, path: str) -> bool:
    """Whether an answer came to its end."""
    if reply.status != 200:
        return False
    ending = b"event: message_stop" if path == "/v1/messages" else b"data: [DONE]"
    return ending in reply.body or reply.body.startswith(b"{")


class Load:
    """One load on a server."""

    def __init__(self, address: Address, requests: int, clients: int, seed: int):
        self._address, self._requests, self._clients, self._seed = address, requests, clients, seed
        self._lock = Lock()
        self._left = self._lost = self._mixed_up = 0
        self._seconds = [1.0]  # that whole answers took

    def run(self, different: int, slots: int) -> LoadFigures:
        """Ask. different: so many of the requests differ. slots: answers that the server computes at a time."""
        asked = draw_requests(different, self._seed)
        alone = [self._ask_alone(one) for one in asked]
        start = time.perf_counter()
        with ThreadPoolExecutor(self._clients) as clients:
            list(clients.map(lambda number: self._ask(number, asked, alone), range(self._requests)))
        seconds = time.perf_counter() - start
        return LoadFigures(
            requests=self._requests,
            clients=self._clients,
            left=self._left,
            lost=self._lost,
            mixed_up=self._mixed_up,
            open_answers=wait_until_none_is_open(self._address),
            free_slots=count_free_slots(self._address, slots),
            slots=slots,
            seconds=seconds,
        )

    def _ask_alone(self, one: Asked) -> dict[int, str]:
        reply = ask(self._address, one.path, one.dump(streams=False))
        if reply.status != 200:
            said = to_one_line(reply.body[:200].decode(errors="replace"))
            raise LlamaError(f"{one.path} answered {reply.status}, expected 200, while nothing else was asked: {said}")
        return read_texts(reply, one.path)

    def _ask(self, number: int, asked: Sequence[Asked], alone: Sequence[dict[int, str]]) -> None:
        rng = random.Random(f"{self._seed} {number}")
        place = rng.randrange(len(asked))
        one, expected = asked[place], alone[place]
        typical = sum(self._seconds) / len(self._seconds)
        leave_after = rng.uniform(0, typical) if rng.random() < SHARE_LEAVING else None
        began = time.perf_counter()
        try:
            reply = ask(self._address, one.path, one.dump(rng.random() < 0.7), leave_after)
        except (OSError, HTTPException):
            reply = Reply(None)
        stayed = leave_after is None or reply.is_whole
        is_lost = stayed and not is_answered(reply, one.path)
        if stayed and not is_lost:
            is_same = read_texts(reply, one.path) == expected
        else:
            is_same = all(expected.get(i, "").startswith(text) for i, text in read_begun(reply, one.path).items())
        with self._lock:
            self._left += not stayed
            self._seconds += [time.perf_counter() - began] * (leave_after is None)
            self._lost += is_lost
            self._mixed_up += not is_same


def wait_until_none_is_open(address: Address) -> int:
    """Answers that a server still has after some time."""
    deadline = time.monotonic() + SECONDS_TO_FREE
    while (count := count_open(address)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return count


def count_open(address: Address) -> int:
    return int(sum(map(float, OPEN_ANSWERS.findall(get(address, "/metrics")))))


def count_free_slots(address: Address, most: int) -> int:
    """Answers that a server computes at once: of `most` long ones, those that begin before any has ended."""
    form = {"type": "regex", "regex": f"[a-z]{{{LETTERS}}}"}
    dialog = [{"role": "user", "content": "Write letters."}]
    body = json.dumps({"messages": dialog, "response_format": form, "stream": True}).encode()
    begun, one_ended = set[int](), Event()

    def hold(number: int) -> None:
        def note(piece: bytes) -> None:
            if WRITTEN.search(piece) and not one_ended.is_set():
                begun.add(number)

        ask(address, "/v1/chat/completions", body, on_piece=note)
        one_ended.set()

    with ThreadPoolExecutor(most) as clients:
        list(clients.map(hold, range(most)))
    return len(begun)
