"""Task heads in Hugging Face's files: their keys in `config.json`, and their tensors.

Knows dictionaries of values and of tensors; opens no file, and knows no network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from ..errors import LlamaError, shorten
from .families import Family
from .task_spec import SPECS, Body, HeadConfig, TaskName

MOST_LABELS = 1_000_000
BACKBONE = "Model"  # how the class of a network without an output layer ends
# The keys of config.json that describe a head.
HEAD_KEYS = {"id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "hidden_dropout"}


def architecture(family: Family, task: TaskName, has_output: bool = True) -> str:
    """The class of transformers: LlamaForCausalLM, or LlamaModel without an output layer."""
    return family.class_stem + (SPECS[task].suffix if has_output else BACKBONE)


def has_backbone_class(values: Mapping[str, Any]) -> bool:
    """Whether a configuration names the class of the network without an output layer and without a head."""
    return class_name(values).endswith(BACKBONE)


def body_name(family: Family, task: TaskName) -> Body:
    """The prefix of the network's tensors in files of this family and task."""
    return family.body or SPECS[task].body


def class_name(values: Mapping[str, Any]) -> str:
    """The first of a configuration's `architectures`; "" where that is no text."""
    names = values.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def task_of(values: Mapping[str, Any]) -> TaskName:
    """The task of a configuration, by its `architectures`; "language" where they name no other task."""
    return next((spec.name for spec in SPECS.values() if class_name(values).endswith(spec.suffix)), "language")


def split_head(tensors: Mapping[str, Tensor], task: TaskName) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file -> (those of the network, by the names of a language model; those of the head).

    In a file with a head, a tensor of the output layer is in neither: no class of transformers with a head reads it.
    """
    expected = SPECS[task].tensors
    head = {name: tensors[name] for name in expected if name in tensors}
    body = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if name not in head and (not expected or first != "lm_head"):
            usual = f"model.{rest}" if expected and first in get_args(Body) else name
            body[name if usual in body else usual] = tensor
    return body, head


def find_head_problems(head: Mapping[str, Tensor], task: TaskName, labels: int, dim: int) -> list[str]:
    """What is missing or misshapen of a head.

    labels: how many it has. dim: of the model.
    """
    problems = []
    sizes = {"labels": labels, "dim": dim}
    for name, shape in SPECS[task].tensors.items():
        expected = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
        if name not in head:
            problems.append(f"missing {name}")
        elif tuple(head[name].shape) != expected:
            problems.append(f"{name} of shape {tuple(head[name].shape)}, expected {expected}")
        elif not head[name].is_floating_point():
            problems.append(f"{name} of {head[name].dtype}, expected floating-point numbers")
    return problems


def read_head(values: Mapping[str, Any], task: TaskName, path: Path) -> HeadConfig:
    """The head that a configuration describes. Raises LlamaError, naming the key, for values that can't be."""
    spec, dropout = SPECS[task], 0.0
    if spec.dropout is not None:
        keys = ("classifier_dropout", "hidden_dropout")
        dropout = next((values[key] for key in keys if values.get(key) is not None), spec.dropout)
    labels = read_labels(values, path) if spec.outputs is None else spec.outputs
    problem_type = values.get("problem_type") if spec.outputs is None else None
    try:
        return HeadConfig(labels, problem_type, dropout)
    except LlamaError as e:
        raise LlamaError(f"{path}: {e}") from None


def read_labels(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The names in `id2label`, in the order of the ids; without it, LABEL_0 and so on, `num_labels` of them or two."""
    names = values.get("id2label")
    if names is None:
        count = values.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_LABELS:
            raise LlamaError(f"{path}: num_labels is {shorten(count)}, expected a whole number of at least 1")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise LlamaError(f"{path}: id2label is {shorten(names)}, expected a name for each of 0, 1, 2 ...")
    labels = [names[str(i)] for i in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise LlamaError(f"{path}: id2label is {shorten(names)}, expected texts")
    return tuple(labels)


def drop_head_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of a head, which may be another task's."""
    return {name: value for name, value in values.items() if name not in HEAD_KEYS}


def head_keys(head: HeadConfig, task: TaskName, family: Family) -> dict[str, Any]:
    """What `config.json` says of a head."""
    spec = SPECS[task]
    keys: dict[str, Any] = {"architectures": [architecture(family, task)]}
    if spec.outputs is None:
        keys["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        keys["label2id"] = {label: i for i, label in enumerate(head.labels)}
    if spec.has_problem_type:
        keys["problem_type"] = head.problem_type
    if spec.dropout is not None:
        keys["classifier_dropout"] = head.dropout
    return keys
