"""The table of tasks that a model can be trained for: the records, the examples and the targets of each.

To add a task, call `register` with one record. It holds the records of the tables below: `tasks.registry.Task`, the
head and its metric, and in that `checkpoints.task_spec.TaskSpec`, the names in files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoints.task_spec import SPECS, ProblemType, TaskName
from ..errors import LlamaError, shorten
from ..tasks.metrics import measure_perplexity
from ..tasks.registry import TASKS, Task
from . import record_formats as formats
from .preprocessing import (
    Example,
    Preprocessor,
    pad_labels,
    read_answer,
    read_classify,
    read_language,
    read_tag,
    stack_labels,
    stack_positions,
)
from .record_formats import Record


@dataclass(frozen=True)
class TrainingTask:
    """How records of a task become examples, and what a trained model should predict for them."""

    task: Task
    check: Callable[[Record], object]  # raises LlamaError for a record that can't be used
    read: Callable[[Preprocessor, Record], list[Example]]  # raises LlamaError for a record that doesn't fit
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]  # targets of a batch -> keyword arguments of the head
    get_input: Callable[[Record], Any] | None = None  # what `task.predict` takes
    get_expected: Callable[[Record], Any] | None = None  # what `task.measure` compares a prediction with
    name_classes: Callable[[Sequence[Record]], list[str]] | None = None  # labels of a head for these records
    find_problem_type: Callable[[Record], ProblemType] | None = None
    measure_loss: Callable[[float], dict[str, float]] | None = None  # metrics that follow from the loss alone


TRAINING_TASKS: dict[TaskName, TrainingTask] = {
    task.task.spec.name: task
    for task in (
        TrainingTask(
            TASKS["language"], formats.check_language, read_language, pad_labels, measure_loss=measure_perplexity
        ),
        TrainingTask(
            TASKS["classify"],
            formats.check_classify,
            read_classify,
            stack_labels,
            formats.get_text,
            formats.get_labels,
            formats.name_classes,
            formats.find_problem_type,
        ),
        TrainingTask(
            TASKS["tag"],
            formats.check_tag,
            read_tag,
            pad_labels,
            formats.get_text,
            formats.get_spans,
            formats.name_tags,
        ),
        TrainingTask(
            TASKS["answer"],
            formats.check_answer,
            read_answer,
            stack_positions,
            formats.get_pair,
            formats.get_answers,
        ),
    )
}


def register(task: TrainingTask) -> None:
    """Add a task to the tables: from then on it is read from files, built, trained, measured and written by its name.

    Raises LlamaError for a name that is taken.
    """
    name = task.task.spec.name
    if name in SPECS:
        raise LlamaError(f"there is a task {shorten(name)} already: choose another name")
    SPECS[name], TASKS[name], TRAINING_TASKS[name] = task.task.spec, task.task, task
