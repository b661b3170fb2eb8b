"""The settings of a training, checked before anything is read, and the description by which a training is resumed.

Knows numbers, names and records; knows no model.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.urls import is_url
from .._util.validate import check_count, check_seed, is_number
from ..adapters.lora import Lora
from ..checkpoints.task_spec import TaskName
from ..errors import LlamaError, shorten
from ..parallel import Place
from .dataset import Line
from .registry import TRAINING_TASKS


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained on which data, and how. Raises LlamaError for values that can't work."""

    task: TaskName
    data: str  # file of records to train on: see `record_formats`
    output: str  # directory to write
    eval: str | None = None  # file of records to evaluate on
    epochs: int = 3
    batch_size: int = 16  # examples a step, over all data-parallel copies
    micro_batch_size: int | None = None  # how many of them go through one copy of the model at a time; None: all
    learning_rate: float = 1e-4  # the peak; 1e-4 to 1e-3 suit adapters, 1e-5 to 1e-4 whole models of 1B parameters
    warmup: float = 0.1  # the share of the steps in which the rate rises linearly; then it falls linearly to 0
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # the largest norm of a gradient
    every: int | None = None  # steps between evaluations, after each of which a killed run resumes; None: an epoch
    patience: int | None = None  # stop after so many evaluations without a better one; None: never
    recompute: bool = False  # compute layers again for the gradient, which takes less memory
    lora: Lora | None = None  # train an adapter in place of the model's own weights
    adapter_dir: str | None = None  # an adapter to train further, in place of a new one
    merge: bool = True  # write a model with the adapter merged, beside the adapter
    max_seq_len: int = 512  # tokens
    seed: int = 1

    def __post_init__(self) -> None:
        if self.task not in TRAINING_TASKS:
            raise LlamaError(f"task is {shorten(self.task)}, expected one of {', '.join(TRAINING_TASKS)}")
        for name in ("epochs", "batch_size", "max_seq_len"):
            check_count(name, getattr(self, name))
        for name in ("micro_batch_size", "every", "patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_seed(self.seed)
        for name in ("learning_rate", "clip"):
            if not is_number(value := getattr(self, name)) or value <= 0:
                raise LlamaError(f"{name} is {shorten(value)}, expected a number above 0")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise LlamaError(f"warmup is {shorten(self.warmup)}, expected a share of the steps, in [0, 1]")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise LlamaError(f"weight_decay is {shorten(self.weight_decay)}, expected a number of at least 0")
        if self.patience is not None and self.eval is None:
            raise LlamaError("patience was given without eval: name the records to evaluate on, or drop patience")
        if self.lora is not None and self.adapter_dir is not None:
            raise LlamaError("lora and adapter_dir were both given: one that is trained further has sizes already")
        if not self.merge and self.lora is None and self.adapter_dir is None:
            raise LlamaError("merge is off, but there is no adapter: give lora or adapter_dir, or leave it on")


def describe_job(
    config: TrainingConfig,
    place: Place,
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None,
    lines: Sequence[Line],
) -> dict[str, Any]:
    """The plain values that decide the result. A run may resume another one only if these are equal."""
    records = repr([line.record for line in lines])
    elsewhere = ("output", "data", "eval", "lora", "adapter_dir")
    settings = {name: value for name, value in vars(config).items() if name not in elsewhere}
    digest = hashlib.sha256(records.encode("utf-8", "surrogatepass")).hexdigest()
    inputs = {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path}
    inputs |= {} if config.adapter_dir is None else {"adapter_dir": config.adapter_dir}
    paths = {n: str(path) if path is None or is_url(path) else os.path.realpath(path) for n, path in inputs.items()}
    ranks = {"ranks": place.world_size, "model_parallel_size": place.mp_size, "dtype": str(place.dtype)}
    return {**settings, "lora": repr(config.lora), "records": digest, **paths, **ranks}
