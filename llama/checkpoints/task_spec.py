"""Task heads in Hugging Face's files: the task that `architectures` names, the tensors of its head, its labels.

Knows config.json and names; knows no network.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from .._util.validate import is_number
from ..errors import LlamaError, shorten

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
Task = Literal["language", "classify", "tag", "answer"]
ENDINGS: dict[Task, str] = {
    "language": "ForCausalLM",
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
}
TENSORS: dict[Task, tuple[str, ...]] = {
    "language": (),
    "classify": ("score.weight",),
    "tag": ("score.weight", "score.bias"),
    "answer": ("qa_outputs.weight", "qa_outputs.bias"),
}
FAMILY_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
Body = Literal["model", "transformer"]  # what the Transformer is called in a file
TAG_DROPOUT = 0.1  # where a configuration of ...ForTokenClassification says nothing
MOST_LABELS = 1_000_000


@dataclass(frozen=True)
class HeadConfig:
    """labels: the names of the classes, in the order of their logits. problem_type: None is inferred from the labels
    that a loss is computed of, as transformers does it. dropout: of hidden states before a TokenClassifier's layer, in
    training. Raises LlamaError for what makes no head."""

    labels: tuple[str, ...]
    problem_type: ProblemType | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        texts = all(isinstance(label, str) for label in self.labels)
        if not texts or not self.labels or len(set(self.labels)) < len(self.labels):
            raise LlamaError(f"labels are {shorten(self.labels)}, expected at least one name, each of them once")
        if self.problem_type is not None and self.problem_type not in get_args(ProblemType):
            expected = ", ".join(get_args(ProblemType))
            raise LlamaError(f"problem_type is {shorten(self.problem_type)}, expected one of {expected}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LlamaError(f"dropout is {shorten(self.dropout)}, expected a number in [0, 1)")

    def inferred(self, labels: Tensor | None = None) -> ProblemType:
        """labels: as a SequenceClassifier takes them, if there are any."""
        if self.problem_type is not None:
            return self.problem_type
        if len(self.labels) == 1:
            return "regression"
        if labels is None or not labels.is_floating_point():
            return "single_label_classification"
        return "multi_label_classification"


def architecture(family: str, task: Task) -> str:
    return FAMILY_NAMES[family] + ENDINGS[task]


def task_of(values: dict[str, Any]) -> Task:
    """By a configuration's `architectures`; language where it names none of the tasks."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((task for task, ending in ENDINGS.items() if name.endswith(ending)), "language")


def body_name(family: str, task: Task) -> Body:
    """What transformers calls the Transformer in files of this task."""
    return "transformer" if task == "answer" and family != "mistral" else "model"


def divided(tensors: dict[str, Tensor], task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors -> (those of the Transformer, as a language model names them, those of the head).

    An output layer that was left beside a head is neither: no class of transformers with a head reads it.
    """
    head = {name: tensors[name] for name in TENSORS[task] if name in tensors}
    body = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if name not in head and (task == "language" or first != "lm_head"):
            usual = f"model.{rest}" if task != "language" and first in get_args(Body) else name
            body[name if usual in body else usual] = tensor
    return body, head


def misfits(head: dict[str, Tensor], task: Task, labels: int, dim: int) -> list[str]:
    """What is missing or misshapen of a head."""
    problems = []
    for name in TENSORS[task]:
        expected: tuple[int, ...] = (labels, dim) if name.endswith("weight") else (labels,)
        if name not in head:
            problems.append(f"missing {name}")
        elif tuple(head[name].shape) != expected:
            problems.append(f"{name} of shape {tuple(head[name].shape)}, expected {expected}")
        elif not head[name].is_floating_point():
            problems.append(f"{name} of {head[name].dtype}, expected floating-point numbers")
    return problems


def read_head(values: dict[str, Any], task: Task, path: Path) -> HeadConfig:
    """What a configuration says of its head. Raises LlamaError, naming the key, for what can't be."""
    if task == "answer":
        return HeadConfig(("start", "end"))
    labels, dropout = read_labels(values, path), 0.0
    if task == "tag":
        given = [values[key] for key in ("classifier_dropout", "hidden_dropout") if values.get(key) is not None]
        dropout = given[0] if given else TAG_DROPOUT
    try:
        return HeadConfig(labels, values.get("problem_type"), dropout)
    except LlamaError as e:
        raise LlamaError(f"{path}: {e}") from None


def read_labels(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    """`id2label` in the order of the ids; without, as many names as `num_labels` says, or two."""
    names = values.get("id2label")
    if names is None:
        count = values.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_LABELS:
            raise LlamaError(f"{path}: num_labels is {shorten(count)}, expected a whole number of at least 1")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise LlamaError(f"{path}: id2label is {shorten(names)}, expected a name for each of 0, 1, 2 ...")
    found = [names[str(i)] for i in range(len(names))]
    if not all(isinstance(name, str) for name in found):
        raise LlamaError(f"{path}: id2label is {shorten(names)}, expected texts")
    return tuple(found)


def without_head(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of a head, which may be another task's."""
    said = {"id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "hidden_dropout"}
    return {name: value for name, value in values.items() if name not in said}


def config_keys(config: HeadConfig, task: Task, family: str) -> dict[str, Any]:
    """What `config.json` says of a head."""
    keys: dict[str, Any] = {"architectures": [architecture(family, task)]}
    if task in ("classify", "tag"):
        keys["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        keys["label2id"] = {label: i for i, label in enumerate(config.labels)}
    if task == "classify":
        keys["problem_type"] = config.problem_type
    if task == "tag":
        keys["classifier_dropout"] = config.dropout
    return keys
