"""What tells one task from another in files: pure data of the tasks and of their heads.

Knows names; knows no file and no network.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from .._util.validate import is_number
from ..errors import LlamaError, shorten

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
Task = Literal["language", "classify", "tag", "answer"]
ENDINGS: dict[Task, str] = {  # of the names of transformers' classes
    "language": "ForCausalLM",
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
}
TENSORS: dict[Task, tuple[str, ...]] = {  # of the head, as files name them
    "language": (),
    "classify": ("score.weight",),
    "tag": ("score.weight", "score.bias"),
    "answer": ("qa_outputs.weight", "qa_outputs.bias"),
}
Body = Literal["model", "transformer"]  # the prefix of the network's tensors in files
BODIES: dict[Task, Body] = {"answer": "transformer"}  # of the others: "model"
TAG_DROPOUT = 0.1  # of a ...ForTokenClassification whose config.json has none


@dataclass(frozen=True)
class HeadConfig:
    """What makes a head, beside the size of its model. Raises LlamaError for values that no head can have."""

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
