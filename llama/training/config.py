"""What is trained on what, and how: a plan, checked before anything is read, and what makes it this one and no other.

Knows numbers, names and records; knows no model.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.validate import check_count, check_seed, is_number
from ..adapters.lora import Lora
from ..checkpoints.download import is_url
from ..checkpoints.task_spec import TENSORS, ProblemType, Task
from ..errors import LlamaError
from ..parallel import Place
from .dataset import Record, problem_of


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained on what. data, eval: files of records, see `records`. output: the directory to be written.

    batch_size: examples a step, over all data-parallel copies; micro_batch_size: how many of them go through a copy
    of the model at a time (None: all). learning_rate: rises linearly in the first `warmup` of all steps, then falls.
    weight_decay: of matrices. clip: the largest norm of a gradient. every: steps between two evaluations, each of which
    is also where a killed run goes on (None: an epoch). patience: how many evaluations may pass without a better one
    (None: all). recompute: layers again for the gradient, which takes less memory. lora: adapters instead of the
    model's own weights; learning rates of 1e-4 to 1e-3 suit them, of 1e-5 to 1e-4 whole models of a billion and more.
    merge: write the adapter into the weights too. Raises LlamaError for what can't be.
    """

    task: Task
    data: str
    output: str
    eval: str | None = None
    epochs: int = 3
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int | None = None
    patience: int | None = None
    recompute: bool = False
    lora: Lora | None = None
    merge: bool = True
    max_seq_len: int = 512
    seed: int = 1

    def __post_init__(self) -> None:
        if self.task not in TENSORS:
            raise LlamaError(f"task is {self.task!r}, expected one of {', '.join(TENSORS)}")
        for name in ("epochs", "batch_size", "max_seq_len"):
            check_count(name, getattr(self, name))
        for name in ("micro_batch_size", "every", "patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_seed(self.seed)
        for name in ("learning_rate", "clip"):
            if not is_number(value := getattr(self, name)) or value <= 0:
                raise LlamaError(f"{name} is {value!r}, expected a number above 0")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise LlamaError(f"warmup is {self.warmup!r}, expected a share of the steps, in [0, 1]")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise LlamaError(f"weight_decay is {self.weight_decay!r}, expected a number of at least 0")
        if self.patience is not None and self.eval is None:
            raise LlamaError("patience was given without eval: name the records to evaluate on, or drop patience")
        if not self.merge and self.lora is None:
            raise LlamaError("merge is off, but there is no adapter: give lora, or leave it on")


def problem_in(plan: TrainingConfig, trained: Sequence[Record], held: Sequence[Record]) -> ProblemType:
    """What kind of labels both files have. Raises LlamaError where they differ in that."""
    problem = problem_of(trained, plan.data)
    if held and (other := problem_of(held, plan.eval or "")) != problem:
        raise LlamaError(f"{plan.data} is {problem} and {plan.eval} {other}: expected one kind of labels")
    return problem


def about(
    plan: TrainingConfig,
    place: Place,
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None,
    records: Sequence[Record],
) -> dict[str, Any]:
    """What makes the result what it is, for a run that goes on with another's."""
    given = repr([record.given for record in records])
    settings = {name: value for name, value in vars(plan).items() if name not in ("output", "data", "eval", "lora")}
    digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()
    named = {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path}
    paths = {n: str(path) if path is None or is_url(path) else os.path.realpath(path) for n, path in named.items()}
    ranks = {"ranks": place.world_size, "model_parallel_size": place.mp_size, "dtype": str(place.dtype)}
    return {**settings, "lora": repr(plan.lora), "records": digest, **paths, **ranks}
