"""The server under random bodies, many clients and random schemas: smaller counts of what `bench --stress` asks."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from running_server import Running, start
from tiny import write_checkpoint

from llama import Llama
from llama.bench.asking import Address, Reply, ask_json
from llama.bench.fuzz import EXAMPLES, draw_bodies
from llama.bench.schemas import find_fault, is_prefix
from llama.bench.stress import (
    BodyFigures,
    MemoryFigures,
    SchemaFigures,
    StressCounts,
    StressReport,
    ask_for_schemas,
    find_fault_of_reply,
    run_stress,
    send_bodies,
    watch_memory,
)
from llama.bench.stress_load import Load, LoadFigures, is_answered, read_texts
from llama.server.app import make_app


def address_of(server: Running) -> Address:
    return "127.0.0.1", int(server.url.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def random_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model with random weights, whose words are bytes."""
    options: dict[str, Any] = {"max_seq_len": 2048, "max_batch_size": 8, "device": "cpu", "dtype": "float32"}
    llama = Llama.build(write_checkpoint(tmp_path_factory.mktemp("random")), **options)
    with ExitStack() as stack:
        yield start(stack, llama)


def test_1000_random_bodies(server: Running) -> None:
    figures = send_bodies(address_of(server), 1000, seed=2)
    assert figures.faults == []
    assert sum(figures.statuses.values()) == 1000 and {"200", "400"} <= figures.statuses.keys()
    assert figures.statuses["200"] > 50
    server.wait_until_idle()


def test_300_requests_64_at_once_a_third_of_which_go_away(server: Running) -> None:
    server.wait_until_idle()
    figures = Load(address_of(server), 300, 64, seed=2).run(different=40, slots=4)
    assert figures.faults == [] and figures.left > 20
    server.wait_until_idle()
    assert server.llama.engine.stepper.scheduler.running == 0


def test_100_answers_to_schemas(random_server: Running) -> None:
    figures = ask_for_schemas(address_of(random_server), 100, seed=2)
    assert figures.faults == [] and figures.bounded_valid == 100
    assert figures.unbounded_valid + figures.unbounded_begun == 25 and figures.unbounded_begun > 0


def test_memory_is_measured(server: Running) -> None:
    assert watch_memory(address_of(server), 20, lambda: 100).faults == []
    sizes = iter(range(0, 1 << 30, 1 << 24))
    assert watch_memory(address_of(server), 10, lambda: next(sizes)).faults == [
        "memory grew by 128.0 MiB while 8 requests were answered"
    ]
    assert watch_memory(address_of(server), 10, lambda: None) == MemoryFigures(10, [], [])


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_every_endpoint_has_examples_which_are_answered(tool_server: Running) -> None:
    paths = make_app(tool_server.service).openapi()["paths"]
    assert {path for path, _ in EXAMPLES} == {path for path, item in paths.items() if "post" in item}
    for path, body in EXAMPLES:
        reply = ask_json(address_of(tool_server), path, body)
        assert reply.status == 200 and find_fault_of_reply(reply) is None, (path, body, reply.body)


def test_a_seed_gives_the_same_bodies() -> None:
    bodies = [*draw_bodies(500, 3)]
    assert bodies == [*draw_bodies(500, 3)] != [*draw_bodies(500, 4)]
    assert len({body for _, body in bodies}) > 400


# --- what has to come of it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (Reply(200, b'{"a": 1}'), None),
        (Reply(400, b'{"error": {"message": "no"}}'), None),
        (Reply(200, b'data: {"a": 1}\n\ndata: [DONE]\n\n'), None),
        (Reply(500, b"{}"), "status 500"),
        (Reply(200, b"<html>"), "neither JSON nor events"),
        (Reply(404, b"{}"), "without an error object"),
        (Reply(200, b'data: {"error": {"message": "it broke"}}\n\n'), "a stream failed"),
    ],
)
def test_faults_of_replies(reply: Reply, fault: str | None) -> None:
    found = find_fault_of_reply(reply)
    assert found is None if fault is None else fault in (found or "")


def test_texts_and_ends_of_replies() -> None:
    chunks = [{"choices": [{"index": i, "delta": {"content": text}}]} for i, text in [(0, "a"), (1, "b"), (0, "c")]]
    begun = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode()
    assert read_texts(Reply(200, begun + b'data: {"cho'), "/v1/chat/completions") == {0: "ac", 1: "b"}
    assert not is_answered(Reply(200, begun), "/v1/chat/completions")
    assert is_answered(Reply(200, begun + b"data: [DONE]\n\n"), "/v1/chat/completions")
    assert not is_answered(Reply(429, b"{}"), "/v1/chat/completions")


def test_faults_of_loads() -> None:
    good = LoadFigures(9, 3, left=2, lost=0, mixed_up=0, open_answers=0, free_slots=4, slots=4, seconds=1.0)
    assert good.faults == []
    bad = replace(good, lost=1, mixed_up=2, open_answers=3, free_slots=2)
    assert bad.faults == ["1 requests lost", "2 answers mixed up", "3 answers left open", "2 slots leaked"]


def test_answers_that_are_not_of_a_schema() -> None:
    assert find_fault("1", {"type": "integer"}) is None
    assert find_fault("1.5", {"type": "integer"}) == "1.5 is not of type 'integer'"
    assert find_fault("{", {}) is not None
    assert is_prefix('{"a', {"type": "json_object"}) and not is_prefix("a", {"type": "json_object"})


def test_the_report_tells_all_figures() -> None:
    load = LoadFigures(9, 3, left=2, lost=1, mixed_up=0, open_answers=0, free_slots=4, slots=4, seconds=1.0)
    bodies, schemas = BodyFigures(7, {"200": 3, "400": 4}, 0.1, 1.0, []), SchemaFigures(8, 8, 2, 1, 1, 1.0, [])
    report = StressReport(bodies, load, MemoryFigures(10, [1 << 20] * 10, []), schemas)
    assert report.faults == ["1 requests lost"] and json.loads(report.as_json())["schemas"]["bounded"] == 8
    text = report.as_text()
    assert "3 got 200, 4 got 400" in text and "8 of 8 answers to bounded ones" in text
    assert text.splitlines()[-1].split() == ["faults", "1", "requests", "lost"]


@pytest.mark.slow
def test_servers_of_their_own_are_asked() -> None:
    report = run_stress("cpu", StressCounts(bodies=50, requests=40, different=8, memory_requests=50, schemas=8))
    assert report.faults == []
    assert report.bodies.bodies == 50 and report.load.slots == 8 and report.schemas.bounded_valid == 8
