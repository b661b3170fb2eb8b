"""What tests/tasks/test_heads.py runs on ranks: losses, logits and gradients of task heads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import TaskModel, parallel
from llama.training import gradients


def outputs(found: Any) -> dict[str, Tensor]:
    """What a head gave, by name; CausalLM gives its loss alone."""
    return {"loss": found} if isinstance(found, Tensor) else {k: v for k, v in vars(found).items() if v is not None}


def compute(jobs: list[dict[str, Any]]) -> None:
    """Of each {"directory", "task", "inputs": what goes into the head, as lists, "output": a directory, "recomputed"}.

    Rank 0 writes output/result.pt, and a checkpoint whose tensors are the gradients.
    """
    for job in jobs:
        built = TaskModel.build(job["directory"], device="cpu", dtype="float32")
        head = built.head.train()
        if job["recomputed"]:
            gradients.checkpoint_layers(built.model)
        result = outputs(head(**{name: torch.tensor(value) for name, value in job["inputs"].items()}))
        result["loss"].backward()
        gradients.sum_over_ranks(head, built.model.params)
        result["norm"] = gradients.clip(head, built.model.params, 1e9)
        for parameter in head.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        built.save(job["output"])
        if parallel.is_main_process():
            torch.save({k: v.detach() for k, v in result.items()}, Path(job["output"]) / "result.pt")
