"""What tests/tasks/test_task_model.py runs on ranks."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llama import LlamaError, TaskModel, parallel
from llama.checkpoints import huggingface
from llama.tasks import losses

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


def refusal(do: Callable[[], object]) -> str:
    try:
        do()
    except LlamaError as e:
        return str(e)
    return "nothing was refused"


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def language_losses(cases: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Of each case, {"h", "weight", "labels"}: the loss, and the gradients of h and of this rank's words."""
    parallel.initialize(device="cpu")
    found = {}
    for name, case in cases.items():
        ranks = parallel.group().size()
        h = case["h"].clone().requires_grad_()
        weight = case["weight"].chunk(ranks)[parallel.group().rank()].clone().requires_grad_()
        loss = losses.language_loss(h, weight, case["labels"])
        loss.backward()
        found[name] = {"loss": loss.item(), "h": h.grad.tolist(), "weight": weight.grad.tolist()}
    return found


def failures(directory: Path) -> dict[str, Any]:
    """What all ranks hear where one of them fails, and what is left of it."""
    parallel.initialize(device="cpu")
    own = directory / "model" if parallel.is_main_process() else directory / "elsewhere"
    found = {"unreadable": refusal(lambda: TaskModel.build(own, **OPTIONS))}
    built = TaskModel.build(directory / "model", **OPTIONS)
    found["taken"] = refusal(lambda: built.save(directory / "taken"))
    with mock.patch.object(os, "posix_fallocate", full):
        found["parts"] = refusal(lambda: built.save(directory / "new" / "parts"))
    with mock.patch.object(shutil, "copyfile", full):
        found["files"] = refusal(lambda: built.save(directory / "new" / "files"))
    with mock.patch.object(huggingface, "save_file", full):
        found["again"] = refusal(lambda: built.save(directory / "old", force=True))
    return found


def dropouts(directory: Path) -> dict[str, Any]:
    """The gradient of a tagger's head, in training, on ranks whose generators differ."""
    built = TaskModel.build(directory / "model", **OPTIONS)
    torch.manual_seed(parallel.group().rank())
    tokens = torch.arange(8).view(1, 8)
    head: Any = built.head.train()
    head(tokens, labels=tokens % 3).loss.backward()
    seen = head.score.weight.grad.tolist()
    return {"gradient": seen, "evaluated": float(head.eval()(tokens, labels=tokens % 3).loss)}
