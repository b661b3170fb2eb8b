"""The table of tasks: the head, the predictor and the metric of each.

A task is one record; another record adds a task. What files say about a task is its `spec`; how it is trained is in
`training.registry`, whose `register` adds to all tables. Knows no records of training data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters.peft import PeftTask
from ..checkpoints.task_spec import SPECS, TaskName, TaskSpec
from ..errors import LlamaError, shorten
from .heads import CausalLM, Head, QuestionAnswerer, SequenceClassifier, TokenClassifier
from .metrics import answer_metrics, classification_metrics, span_metrics

if TYPE_CHECKING:
    from .model import TaskModel

NULL_THRESHOLD = 0.0  # a question gets no answer if "no answer" is likelier than the best answer


@dataclass(frozen=True)
class Task:
    """What a model can be built to do."""

    spec: TaskSpec  # what a checkpoint's files say about it
    head: Callable[..., Head | CausalLM]  # called with the Transformer, and with the HeadConfig if the spec has tensors
    peft_type: PeftTask  # `task_type` in adapter_config.json
    predict: Callable[["TaskModel", Sequence[Any]], list[Any]] | None = None  # (model, inputs) -> predictions
    # (predictions, expected) -> metrics
    measure: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]] | None = None
    best_metric: str = "loss"  # the metric that decides which model is best; the larger the better, except the loss


def predict_labels(model: "TaskModel", texts: Sequence[str]) -> list[list[str]]:
    return [[label.label for label in labels] for labels in model.classify(texts)]


def predict_spans(model: "TaskModel", texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    return [[(span.start, span.end, span.label) for span in spans] for spans in model.tag(texts)]


def predict_answers(model: "TaskModel", pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The best answer to each (question, context); "" for none."""
    return [answers[0].text for answers in model.answer_all(pairs, null_threshold=NULL_THRESHOLD)]


TASKS: dict[TaskName, Task] = {
    task.spec.name: task
    for task in (
        Task(SPECS["language"], CausalLM, "CAUSAL_LM"),
        Task(SPECS["classify"], SequenceClassifier, "SEQ_CLS", predict_labels, classification_metrics, "accuracy"),
        Task(SPECS["tag"], TokenClassifier, "TOKEN_CLS", predict_spans, span_metrics, "f1"),
        Task(SPECS["answer"], QuestionAnswerer, "QUESTION_ANS", predict_answers, answer_metrics, "f1"),
    )
}


def find_task(name: TaskName) -> Task:
    """The task's record. Raises LlamaError for a name that isn't in the table."""
    if name not in TASKS:
        raise LlamaError(f"task is {shorten(name)}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
