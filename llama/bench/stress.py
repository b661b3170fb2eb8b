"""The stress test of the server: random bodies, clients that go away, memory, and answers held to random schemas.

    python -m llama bench --stress

Knows the order of what is asked and what has to come of it; `fuzz`, `stress_load` and `schemas` make the requests.
"""

import contextlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from .._util.files import check_file
from .._util.packages import find_missing, missing_error
from ..checkpoints.demo import demo_checkpoint
from ..checkpoints.loader import survey
from ..checkpoints.meta import save_checkpoint
from ..errors import LlamaError, to_one_line
from .asking import Address, Reply, ask, ask_json
from .fuzz import draw_bodies
from .report import format_report
from .schemas import UNBOUNDED, as_response_format, draw_schema, find_fault, is_prefix
from .server_process import ServerProcess
from .stress_load import Load, LoadFigures, wait_until_none_is_open
from .subjects import iterate_tensors

SLOTS = 8  # answers that are computed at a time
CLIENTS, CLIENTS_OF_LOAD = 16, 64
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
PACKAGES |= {"llguidance": "llguidance", "jsonschema": "jsonschema"}
LONGEST = 40  # tokens of an answer to an unbounded schema
MOST_GROWTH = 8 << 20  # bytes, from a fifth of the requests to the last: the allocator's own ups and downs
DIALOG = [{"role": "user", "content": "Write JSON."}]


@dataclass(frozen=True)
class StressCounts:
    """How much of each is asked."""

    bodies: int = 10_000
    requests: int = 1_000
    different: int = 100  # of the requests, each of which is also asked alone
    memory_requests: int = 10_000
    schemas: int = 500
    seed: int = 1


@dataclass(frozen=True)
class BodyFigures:
    """What came of random bodies."""

    bodies: int
    statuses: dict[str, int]  # how many got which status
    slowest_seconds: float
    seconds: float
    faults: list[str]


@dataclass(frozen=True)
class MemoryFigures:
    """The memory that a server's process has of its own while it answers."""

    requests: int
    bytes_held: list[int]  # after each tenth of the requests; none if the system doesn't say
    faults: list[str]


@dataclass(frozen=True)
class SchemaFigures:
    """Answers of a random model that were held to schemas."""

    bounded: int  # to schemas whose values have a largest length
    bounded_valid: int  # that ended with "stop" and are what the schema describes
    unbounded: int
    unbounded_valid: int  # that ended with "stop" and are what the schema describes
    unbounded_begun: int  # that were cut at their length, and that the grammar accepts so far
    seconds: float
    faults: list[str]


@dataclass(frozen=True)
class StressReport:
    """The report of the stress test."""

    bodies: BodyFigures
    load: LoadFigures
    memory: MemoryFigures
    schemas: SchemaFigures

    @property
    def faults(self) -> list[str]:
        """Everything that went wrong."""
        return [*self.bodies.faults, *self.load.faults, *self.memory.faults, *self.schemas.faults]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        bodies, load, schemas = self.bodies, self.load, self.schemas
        statuses = ", ".join(f"{count:,} got {status}" for status, count in sorted(bodies.statuses.items()))
        held = " ".join(f"{one / (1 << 20):.1f}" for one in self.memory.bytes_held) or "not told by this system"
        facts = {
            "bodies": f"{bodies.bodies:,} random ones in {bodies.seconds:.0f} s, the slowest after "
            f"{bodies.slowest_seconds:.1f} s: {statuses}",
            "load": f"{load.requests:,} requests, {load.clients} at once, in {load.seconds:.0f} s; {load.left} clients "
            f"went away; {load.lost} requests lost, {load.mixed_up} answers mixed up, {load.open_answers} left open, "
            f"{load.free_slots} of {load.slots} slots free",
            "memory": f"MiB after each tenth of {self.memory.requests:,} requests: {held}",
            "schemas": f"{schemas.bounded_valid} of {schemas.bounded} answers to bounded ones end and are valid; of "
            f"{schemas.unbounded} to others {schemas.unbounded_valid} do, {schemas.unbounded_begun} begin so; "
            f"{schemas.seconds:.0f} s",
            "faults": "; ".join(self.faults[:5]) or "none",
        }
        return format_report(facts, []).rstrip()


def run_stress(device: str | None, counts: StressCounts) -> StressReport:
    """Start servers of the demo model in float32 and ask them. Raises LlamaError if one can't be started."""
    if missing := find_missing(*PACKAGES):
        raise missing_error("--stress", *(PACKAGES[module] for module in missing))
    options = ["--dtype", "float32", "--max_batch_size", str(SLOTS), "--model_name", "demo"]
    options += [] if device is None else ["--device", device]
    with contextlib.closing(ServerProcess([*options, "--max_seq_len", "256"])) as server:
        bodies = send_bodies(server.address, counts.bodies, counts.seed)
        load = Load(server.address, counts.requests, CLIENTS_OF_LOAD, counts.seed).run(counts.different, SLOTS)
        memory = watch_memory(server.address, counts.memory_requests, server.measure_memory)
    with tempfile.TemporaryDirectory() as directory:
        write_random_weights(Path(demo_checkpoint()), Path(directory))
        options += ["--ckpt_dir", directory, "--max_seq_len", "2048"]
        with contextlib.closing(ServerProcess(options)) as server:
            schemas = ask_for_schemas(server.address, counts.schemas, counts.seed)
    return StressReport(bodies, load, memory, schemas)


# --- random bodies ----------------------------------------------------------------------------------------------------


def send_bodies(address: Address, count: int, seed: int) -> BodyFigures:
    """Send random bodies. Each has to be answered, and none by a failure of the server."""
    start = time.perf_counter()

    def send(drawn: tuple[str, bytes]) -> tuple[str, float, str | None]:
        path, body = drawn
        began = time.perf_counter()
        try:
            reply = ask(address, path, body)
            status, fault = str(reply.status), find_fault_of_reply(reply)
        except (OSError, HTTPException) as e:
            status, fault = "nothing", f"no answer ({to_one_line(e) or type(e).__name__})"
        shown = None if fault is None else f"{path}: {fault}, for {body[:300]!r}"
        return status, time.perf_counter() - began, shown

    with ThreadPoolExecutor(CLIENTS) as clients:
        results = list(clients.map(send, draw_bodies(count, seed)))
    faults = [fault for _, _, fault in results if fault is not None]
    if open_answers := wait_until_none_is_open(address):
        faults.append(f"{open_answers} answers to random bodies are still open")
    return BodyFigures(
        bodies=count,
        statuses=dict(Counter(status for status, _, _ in results)),
        slowest_seconds=max(seconds for _, seconds, _ in results),
        seconds=time.perf_counter() - start,
        faults=faults,
    )


def find_fault_of_reply(reply: Reply) -> str | None:
    """What no body may get: a status of 500 or more, an answer in no form, a stream that fails or has no end."""
    if reply.status is None or reply.status >= 500:
        return f"status {reply.status}, {reply.body[:200]!r}"
    try:
        events = reply.events if reply.body.startswith((b"data: ", b"event: ")) else [reply.read()]
    except ValueError:
        return f"neither JSON nor events, {reply.body[:200]!r}"
    said = [event for event in events if isinstance(event, dict)]
    if reply.status == 200 and (failed := [event for event in said if event.get("error")]):
        return f"a stream failed, {failed[0]}"
    if reply.status != 200 and not all(isinstance(event.get("error"), dict) for event in said):
        return f"status {reply.status} without an error object, {reply.body[:200]!r}"
    return None


# --- memory -----------------------------------------------------------------------------------------------------------


def watch_memory(address: Address, count: int, measure: Callable[[], int | None]) -> MemoryFigures:
    """Ask for many short answers. measure: the bytes that the server holds now."""
    held = []
    for tenth in range(10):
        numbers = range(tenth * count // 10, (tenth + 1) * count // 10)
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda number: ask_shortly(address, number), numbers))
        if (now := measure()) is not None:
            held.append(now)
    growth = held[-1] - held[1] if held else 0
    fault = f"memory grew by {growth / (1 << 20):.1f} MiB while {count * 4 // 5:,} requests were answered"
    return MemoryFigures(count, held, [fault] if growth > MOST_GROWTH else [])


def ask_shortly(address: Address, number: int) -> None:
    text = f"What is {number}? {'It is a number. ' * (number % 5)}"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": number % 2 == 0}
    reply = ask_json(address, "/v1/chat/completions", body)
    if reply.status != 200:
        raise LlamaError(f"the server answered {reply.status}: {to_one_line(reply.body[:200].decode())}")


# --- schemas ----------------------------------------------------------------------------------------------------------


def write_random_weights(source: Path, directory: Path) -> None:
    """A checkpoint of the sizes and words of another one, in Meta's format, whose weights are random."""
    place = parallel.initialize(None, "cpu", torch.float32)
    args = survey(source).sizes
    save_checkpoint(directory, args, dict(iterate_tensors(args, place, None)))
    check_file(source / "tokenizer.model")
    shutil.copy(source / "tokenizer.model", directory)


def ask_for_schemas(address: Address, count: int, seed: int) -> SchemaFigures:
    """Ask for answers to random bounded schemas, and for a quarter as many to unbounded ones."""
    start = time.perf_counter()
    bounded = [draw_schema(random.Random(f"{seed} {number // 4}")) for number in range(count)]
    unbounded = [schema for schema, _ in zip(iterate_unbounded(), range(count // 4), strict=False)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        first = list(clients.map(partial(ask_for_schema, address, None), range(count), bounded))
        second = list(clients.map(partial(ask_for_schema, address, LONGEST), range(count), unbounded))
    faults = [f"answer to a bounded schema: {verdict}" for verdict in first if verdict != "valid"]
    faults += [f"answer to an unbounded schema: {verdict}" for verdict in second if verdict not in ("valid", "begun")]
    return SchemaFigures(
        bounded=count,
        bounded_valid=first.count("valid"),
        unbounded=len(second),
        unbounded_valid=second.count("valid"),
        unbounded_begun=second.count("begun"),
        seconds=time.perf_counter() - start,
        faults=faults,
    )


def iterate_unbounded() -> Iterator[dict[str, Any]]:
    while True:
        yield from UNBOUNDED.values()


def ask_for_schema(address: Address, most: int | None, number: int, schema: dict[str, Any]) -> str:
    """ "valid", "begun" for what was cut at `most` tokens and is accepted so far, or what is wrong."""
    response_format = as_response_format(schema)
    body = {"messages": DIALOG, "response_format": response_format, "seed": number, "max_tokens": most}
    reply = ask_json(address, "/v1/chat/completions", {**body, "temperature": 1, "top_p": 1})
    if reply.status != 200:
        return f"status {reply.status}, {reply.body[:200]!r}"
    (choice,) = reply.read()["choices"]
    text, reason = choice["message"]["content"], choice["finish_reason"]
    if reason == "stop":
        return find_fault(text, schema) or "valid"
    if most is not None and is_prefix(text.rstrip("\ufffd"), response_format):
        return "begun"
    return f"{reason!r} after {text[:200]!r}"
