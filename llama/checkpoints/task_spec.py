"""What tells one task from another in files: one record a task, and the configuration of a head.

Knows names; knows no file and no network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from .._util.validate import is_number
from ..errors import LlamaError, shorten

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
TaskName = str  # the name of a task in SPECS
Body = Literal["model", "transformer"]  # the prefix of the network's tensors in files


@dataclass(frozen=True)
class TaskSpec:
    """What a checkpoint's files say about one task."""

    name: str  # as in `--task` and `task=`
    suffix: str  # of transformers' class in `architectures`, after the family's name: "ForTokenClassification"
    # The head's tensors by transformers' names. A shape is of numbers, "labels" and "dim". Empty: the task has no head
    # and uses the language model's output layer.
    tensors: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None  # the head's outputs; None: the labels, which config.json names
    has_problem_type: bool = False  # whether config.json has a `problem_type`
    dropout: float | None = None  # the default of `classifier_dropout`; None: config.json has no such key
    body: Body = "model"  # the prefix of the network's tensors; `Family.body` overrides it


SPECS: dict[TaskName, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("language", "ForCausalLM", outputs=()),
        TaskSpec("classify", "ForSequenceClassification", {"score.weight": ("labels", "dim")}, has_problem_type=True),
        TaskSpec(
            "tag",
            "ForTokenClassification",
            {"score.weight": ("labels", "dim"), "score.bias": ("labels",)},
            dropout=0.1,
        ),
        TaskSpec(
            "answer",
            "ForQuestionAnswering",
            {"qa_outputs.weight": (2, "dim"), "qa_outputs.bias": (2,)},
            outputs=("start", "end"),
            body="transformer",
        ),
    )
}


@dataclass(frozen=True)
class HeadConfig:
    """What describes a head, beside the size of its model. Raises LlamaError for values that no head can have."""

    labels: tuple[str, ...]  # the names of the classes, in the order of their logits
    problem_type: ProblemType | None = None  # None: inferred from the labels of a loss, as transformers does it
    dropout: float = 0.0  # of the hidden states before a TokenClassifier's layer, in training

    def __post_init__(self) -> None:
        texts = all(isinstance(label, str) for label in self.labels)
        if not texts or not self.labels or len(set(self.labels)) < len(self.labels):
            raise LlamaError(f"labels are {shorten(self.labels)}, expected at least one name, each of them once")
        if self.problem_type is not None and self.problem_type not in get_args(ProblemType):
            expected = ", ".join(get_args(ProblemType))
            raise LlamaError(f"problem_type is {shorten(self.problem_type)}, expected one of {expected}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LlamaError(f"dropout is {shorten(self.dropout)}, expected a number in [0, 1)")

    def infer_problem_type(self, labels: Tensor | None = None) -> ProblemType:
        """The problem type: the stated one, or else the one that fits the labels.

        labels: those of a batch, as a SequenceClassifier takes them; None where there are none.
        """
        if self.problem_type is not None:
            return self.problem_type
        if len(self.labels) == 1:
            return "regression"
        if labels is None or not labels.is_floating_point():
            return "single_label_classification"
        return "multi_label_classification"
