"""`python -m llama serve` as a program of its own, under torchrun too, for tests that end it or kill its ranks.

The model is tests/tiny.py's, whose answers don't end by themselves.
"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tiny import ROOT, environment, launched

SECONDS_TO_START = 240
SECONDS_TO_DRAIN = 120  # that torchrun waits for its ranks after a signal: this machine may be busy
SIZES = ("--max_seq_len", "16384", "--max_batch_size", "4", "--device", "cpu", "--dtype", "float32")


@dataclass
class Served:
    """A program that serves."""

    process: subprocess.Popen[str]  # the server, or torchrun
    url: str
    log: Path  # what it has written

    @property
    def ranks(self) -> dict[int, int]:
        """The process of each rank, under torchrun."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            if parent == self.process.pid:
                found |= {int(v[5:]): int(entry.name) for v in variables if v.startswith(b"RANK=")}
        return found

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def metrics(self) -> dict[str, float]:
        """Figures by their name with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def open_answers(self) -> float:
        return sum(value for name, value in self.metrics().items() if name.startswith("llama_open_answers"))

    def wait_until_open(self, count: int, seconds: float = 30) -> None:
        """Until so many answers are waited for."""
        deadline = time.monotonic() + seconds
        while (found := self.open_answers()) != count:
            assert time.monotonic() < deadline, f"{found} answers are open, expected {count}"
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> str:
        """What it has written, once it has ended by itself."""
        self.process.wait(seconds)
        return self.log.read_text()


@contextmanager
def serving(directory: Path, log: Path, *options: str, ranks: int = 0) -> Iterator[Served]:
    """A server until the context ends."""
    command = launched(
        "-m", "llama", "serve", "--ckpt_dir", str(directory), "--port", "0", *SIZES, *options, ranks=ranks
    )
    variables = {**environment(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_DRAIN)}
    with log.open("w") as written:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=written, stderr=subprocess.STDOUT, text=True
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not (found := re.search(r"serving \S+ at (http://\S+)/v1", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Served(process, found[1], log)
    finally:
        if process.poll() is None:
            for number in (*Served(process, "", log).ranks.values(), process.pid):
                os.kill(number, signal.SIGKILL)  # none of them was waited for: their numbers are still theirs
        process.wait(30)


def events(response: httpx2.Response) -> Iterator[Any]:
    """The events of a stream, each as its JSON; the last one of OpenAI's is "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
