"""Training data: files of JSON lines -> records -> examples -> batches. Every line is checked before training begins.

Errors name the file and the line. What a record of each task holds is in `record_formats`. Knows the table of tasks;
knows no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._util.files import read_bytes, unreadable_error
from .._util.json_lines import parse_object
from ..checkpoints.task_spec import ProblemType, TaskName
from ..errors import LlamaError, pluralize
from .preprocessing import Example, Preprocessor, pad
from .registry import TRAINING_TASKS

SHOWN = 5  # bad lines that an error names


@dataclass(frozen=True)
class Line:
    """A line of a file of records."""

    number: int
    record: dict[str, Any]


def read_lines(path: str | Path, task: TaskName) -> list[Line]:
    """All lines that aren't empty. Raises LlamaError that names the lines that can't be used, and why."""
    try:
        contents = read_bytes(path).split(b"\n")
    except OSError as e:
        raise unreadable_error(Path(path), e) from e
    lines, problems = [], []
    for number, content in enumerate(contents, start=1):
        if not content.strip():
            continue
        try:
            record = parse_object(content)
            TRAINING_TASKS[task].check(record)
            lines.append(Line(number, record))
        except LlamaError as e:
            problems.append(f"line {number}: {e}")
    raise_problems(path, problems)
    if not lines:
        raise LlamaError(f"{path} has no lines: expected at least one to {task}")
    return lines


def raise_problems(path: str | Path, problems: Sequence[str]) -> None:
    """Raise LlamaError if there are any."""
    if problems:
        more = f"; and {pluralize(len(problems) - SHOWN, 'more line')}" if len(problems) > SHOWN else ""
        raise LlamaError(f"{path}: {'; '.join(problems[:SHOWN])}{more}")


def find_problem_type(lines: Sequence[Line], task: TaskName, path: str | Path) -> ProblemType | None:
    """The kind of labels that all lines have; None if the task knows one kind. Raises LlamaError if lines differ."""
    find = TRAINING_TASKS[task].find_problem_type
    if find is None:
        return None
    kinds: dict[ProblemType, int] = {}  # the first line of each kind
    for line in lines:
        kinds.setdefault(find(line.record), line.number)
    if len(kinds) > 1:
        (kind, first), (other, second), *_ = kinds.items()
        raise LlamaError(f"{path}: line {first} is {kind} and line {second} {other}: expected one kind of labels")
    return next(iter(kinds))


def name_classes(lines: Sequence[Line], task: TaskName) -> list[str] | None:
    """The labels of a head that is to be trained on these lines; None if the task has fixed outputs."""
    name = TRAINING_TASKS[task].name_classes
    return None if name is None else name([line.record for line in lines])


def make_examples(preprocessor: Preprocessor, task: TaskName, lines: Sequence[Line], path: str | Path) -> list[Example]:
    """The examples of all lines; a long line may give several. Raises LlamaError that names lines that don't fit."""
    examples: list[Example] = []
    problems = []
    for line in lines:
        try:
            examples += TRAINING_TASKS[task].read(preprocessor, line.record)
        except LlamaError as e:
            problems.append(f"line {line.number}: {e}")
    raise_problems(path, problems)
    learnt = [example for example in examples if example.items]
    if lines and not learnt:
        raise LlamaError(
            f"{path}: nothing is learnt of any line within max_seq_len {preprocessor.max_seq_len}: raise max_seq_len"
        )
    return learnt


def collate(batch: Sequence[Example], task: TaskName, device: torch.device) -> dict[str, Tensor]:
    """The arguments of the task's head: tokens (B, T), padded on the right, lengths (B), and the targets."""
    arguments = {
        "tokens": pad([torch.tensor(example.tokens) for example in batch]),
        "lengths": torch.tensor([len(example.tokens) for example in batch]),
        **TRAINING_TASKS[task].collate([example.target for example in batch]),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}
