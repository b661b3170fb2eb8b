"""The process that tests/rank_pool.py starts: it imports what takes seconds once, and forks the ranks of every call.

Reads pickled calls from standard input and writes pickled outcomes to standard output until the input ends. Each call
gets new processes, so that no call sees what another left in a process group, a module or a random generator.
"""

import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Collectives, optimizers and tokenizers import these when they are first used, which takes each rank two seconds.
import blobfile  # noqa: F401
import torch._dynamo
import torch._inductor.utils
import torch.distributed.nn
import torch.distributed.tensor  # noqa: F401

from llama import parallel

SECONDS_AFTER_A_FAILURE = 5  # for the other ranks to say what they have seen


def exit_after(work: Callable[[], object]) -> None:
    """Do a fork's work and end the fork: it must not go on as the process that it was made of."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(processes: set[int], seconds: float) -> str:
    """Wait for all of them; returns what was wrong. Nothing of them runs afterwards."""
    wrong, running, deadline = "", set(processes), time.monotonic() + seconds
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                running.remove(process)
            if ended and status and not wrong:
                wrong = f"a rank ended with status {os.waitstatus_to_exitcode(status)}"
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        if running and time.monotonic() > deadline:
            wrong = wrong or f"not done after {seconds} seconds"
            for process in running:
                os.killpg(process, signal.SIGKILL)
            deadline += 60
        time.sleep(0.005)
    return wrong


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(module: str, function: str, arguments: tuple[Any, ...], ranks: int, seconds: float) -> dict[str, Any]:
    """Call a module's function on new ranks. With 0, in one process that has none of torchrun's variables."""
    call = getattr(importlib.import_module(module), function)
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} if ranks else {}
    with tempfile.TemporaryDirectory() as directory:
        places = [Path(directory) / f"result.{rank}" for rank in range(max(ranks, 1))]
        streams = [Path(directory) / name for name in ("stdout", "stderr")]

        def work(rank: int) -> None:
            os.setpgid(0, 0)
            for stream, target in zip(streams, (sys.stdout, sys.stderr), strict=True):
                os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target.fileno())
            os.environ.update({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {})
            result = call(*arguments)
            parallel.leave()
            places[rank].write_bytes(pickle.dumps(result))

        processes = set()
        for rank in range(len(places)):
            if (process := os.fork()) == 0:
                exit_after(lambda rank=rank: work(rank))  # type: ignore[misc]
            processes.add(process)
        wrong = wait(processes, seconds)
        stdout, stderr = (stream.read_text() if stream.exists() else "" for stream in streams)
        results = [] if wrong else [place.read_bytes() for place in places]
    return {"results": results, "stdout": stdout, "stderr": stderr, "wrong": wrong}


def serve() -> None:
    calls, outcomes = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an import prints is no outcome
    while True:
        try:
            call = pickle.load(calls)
        except EOFError:
            os._exit(0)  # at once, without seconds of tearing down
        try:
            outcome = run(*call)
        except Exception:
            outcome = {"results": [], "stdout": "", "stderr": traceback.format_exc(), "wrong": "the call failed"}
        pickle.dump(outcome, outcomes)
        outcomes.flush()


if __name__ == "__main__":
    serve()
