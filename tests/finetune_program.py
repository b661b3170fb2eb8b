"""What tests/training/test_trainer.py runs on ranks, and in processes that are killed: forks of this one, which has
imported what takes seconds.

    python tests/finetune_program.py JOBS.json

JOBS.json is a list of {"ranks", "config", "ckpt_dir", "model_parallel_size", "kills"}. Neighbouring jobs with the same
"ranks" run in the same processes, as under torchrun. With a seed as "kills", a job of one process is killed at a random
moment and begun again, until it ends. Afterwards JOBS.json holds, for each such group, the reports of its ranks. A
report is a list with an entry a job: the error that was raised, the steps that were made, and how many more files are
open at the last step than at the second; or how often it was killed.
"""

import contextlib
import io
import json
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch._dynamo  # as optimizers do, in each process anew

from llama import LlamaError, parallel
from llama.adapters.lora import Lora
from llama.training import trainer as training
from llama.training.trainer import Training, TrainingConfig, finetune


def read_config(given: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig(**{**given, "lora": Lora(**given["lora"]) if given.get("lora") else None})


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """On the ranks that run, in any division of them."""
    opened, step = [], Training.step

    def count_steps(self: Training) -> float:
        opened.append(len(os.listdir("/proc/self/fd")))
        return step(self)

    if fs_init.model_parallel_is_initialized():
        fs_init.destroy_model_parallel()
    Training.step, error = count_steps, None  # type: ignore[method-assign]
    try:
        finetune(
            read_config(job["config"]), job["ckpt_dir"], None, job["model_parallel_size"], device="cpu", dtype="float32"
        )
    except LlamaError as e:
        error = str(e)
    Training.step = step  # type: ignore[method-assign]
    return {"error": error, "steps": len(opened), "left open": opened[-1] - opened[1] if opened[1:] else 0}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(number: int, call: Callable[..., Any], last: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but `last` at its `number`th time."""
    count = iter(range(1, number))
    return lambda *args, **named: (last if next(count, None) is None else call)(*args, **named)


def doom(chance: random.Random) -> str:
    """Let this process be killed, at a moment that chance chooses; returns which."""
    moment = chance.choice(["before a file is there", "after", "within a state", "within a step", "any time"])
    replace, save, step = os.replace, torch.save, Training.step
    number = chance.randint(1, 10)

    def after(*args: Any) -> None:
        replace(*args)
        kill()

    def half(state: Any, f: Any) -> None:
        save(state, whole := io.BytesIO())
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        kill()

    if moment == "any time":
        threading.Timer(chance.uniform(0, 0.5), kill).start()
    elif moment == "within a state":
        torch.save = nth(chance.randint(1, 2), save, half)
    elif moment == "within a step":
        Training.step = nth(number, step, lambda self: kill())  # type: ignore[method-assign]
    else:
        os.replace = nth(number, replace, after if moment == "after" else lambda *args: kill())
    return moment


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """A fork's own end: it shall not go on as the process that it was made of."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """In processes of their own, since one is to be killed."""
    chance, kills = random.Random(job["kills"]), 0
    while True:
        seed = chance.random()
        if (pid := os.fork()) == 0:
            torch.seed()  # as of a process that was just started
            if job["kills"] is not None and kills < 40:
                doom(random.Random(seed))
            with ended():
                result_of(job)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return {"kills": kills}
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1


def draw(losses: list[float], history: list[dict[str, Any]], path: Path) -> None:
    """Instead of the picture, which takes most of the time."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(history))
    partial.replace(path)


def on_ranks(jobs: list[dict[str, Any]], path: str, count: int) -> list[list[dict[str, Any]]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            with ended():
                Path(f"{path}.{rank}").write_text(json.dumps([result_of(job) for job in jobs]))
                parallel.leave()
        children.append(pid)
    assert not any(os.waitpid(pid, 0)[1] for pid in children)
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(count)]


def main(path: str) -> None:
    training.draw_curves = draw
    reports: list[list[dict[str, Any]]] = []
    for count, group in groupby(json.loads(Path(path).read_text()), lambda job: job["ranks"]):
        jobs = list(group)
        made = [[alone(job) for job in jobs]] if count == 1 else on_ranks(jobs, path, count)
        reports.append(made)
    Path(path).write_text(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
