"""What the tests of fine-tuning run on ranks (test_trainer_ranks.py) and kill (test_trainer_resume.py)."""

import io
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as fs_init
import torch
from rank_server import exit_after

from llama import LlamaError
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


def draw(losses: list[float], history: list[dict[str, Any]], path: Path) -> None:
    """Instead of the picture, which takes most of the time."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(history))
    partial.replace(path)


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


def finetune_until_done(job: dict[str, Any]) -> int:
    """Let processes be killed at moments that chance chooses, until one comes to its end; returns how many were.

    "kills" of the job is a seed; with None, none is killed.
    """
    training.draw_curves = draw
    chance, kills = random.Random(job["kills"]), 0
    while True:
        seed = chance.random()
        if (pid := os.fork()) == 0:
            torch.seed()  # as of a process that was just started
            if job["kills"] is not None and kills < 40:
                doom(random.Random(seed))
            exit_after(lambda: result_of(job))
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return kills
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1


def finetune_all(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each: the error that was raised, the steps that were made, how many more files are open at the last
    step than at the second. A job is {"config", "ckpt_dir", "model_parallel_size"}."""
    training.draw_curves = draw
    return [result_of(job) for job in jobs]
