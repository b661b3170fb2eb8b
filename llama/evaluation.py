"""How good a model in training is on records that it isn't trained on, and the picture of how that went.

Knows tasks, their metrics and curves; knows no optimizer. matplotlib is imported only here.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .answering import answer_all, classify, tag
from .errors import LlamaError
from .examples import DOC_STRIDE, Example, collated
from .head_format import Task
from .metrics import answer_metrics, classification_metrics, span_metrics
from .records import Record
from .tasks import TaskModel

NULL_THRESHOLD = 0.0  # no answer is given where it is likelier than the best one
BEST = {"language": "loss", "classify": "accuracy", "tag": "f1", "answer": "f1"}  # the measure that decides


def check_packages(evaluates: bool) -> None:
    """Whether what draws the curves, and what measures, is here. Raises LlamaError."""
    needed = ["matplotlib", "torchmetrics"] if evaluates else ["matplotlib"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise LlamaError(f"{' and '.join(missing)} isn't installed: pip install llama[finetune]")


def decides(task: Task, regression: bool) -> str:
    return "loss" if regression else BEST[task]


@torch.no_grad()
def measured(
    built: TaskModel, examples: Sequence[Example], records: Sequence[Record], batch_size: int, max_seq_len: int
) -> dict[str, float]:
    """The loss, and what its task's texts are measured by, of records that weren't trained on."""
    built.head.eval()
    total, items = 0.0, 0
    device = built.model.norm.weight.device
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for i in range(0, len(ordered), batch_size):
        batch = ordered[i : i + batch_size]
        found = built.head(**collated(batch, built.task, device))
        count = sum(example.items for example in batch)
        total += float(found if isinstance(found, torch.Tensor) else found.loss) * count
        items += count
    result = {"loss": total / items}
    given = [record.given for record in records]
    sizes = max_seq_len, batch_size
    if built.task == "language":
        return {**result, "perplexity": math.exp(min(result["loss"], 700))}
    if built.task == "classify":
        return result | labels_measured(built, given, *sizes)
    if built.task == "tag":
        spans = tag(built.head, built.tokenizer, [one["text"] for one in given], *sizes)  # type: ignore[arg-type]
        wanted = [[(span["start"], span["end"], span["label"]) for span in one["spans"]] for one in given]
        return result | span_metrics([[(s.start, s.end, s.label) for s in found] for found in spans], wanted)
    pairs = [(one["question"], one["context"]) for one in given]
    options: dict[str, Any] = {"doc_stride": DOC_STRIDE, "null_threshold": NULL_THRESHOLD}
    answers = answer_all(built.head, built.tokenizer, pairs, *sizes, **options)  # type: ignore[arg-type]
    right = [[answer["text"] for answer in one["answers"]] for one in given]
    return result | answer_metrics([found[0].text for found in answers], right)


def labels_measured(built: TaskModel, given: Sequence[dict[str, Any]], *sizes: int) -> dict[str, float]:
    if not isinstance(given[0].get("label", ""), str):
        return {}  # a number's loss says it all
    found = classify(built.head, built.tokenizer, [one["text"] for one in given], *sizes)  # type: ignore[arg-type]
    if "label" in given[0]:
        return classification_metrics([labels[0].label for labels in found], [one["label"] for one in given])
    return classification_metrics([[one.label for one in labels] for labels in found], [one["labels"] for one in given])


def draw(trained: Sequence[float], history: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses of all steps and of held-out records, against steps; beside them what else was measured of the latter."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    names = sorted({name for one in history for name in one} - {"step", "epoch", "trained", "loss", "perplexity"})
    figure = Figure(figsize=(6 + 6 * bool(names), 4), layout="constrained")
    losses, *others = figure.subplots(1, 1 + bool(names), squeeze=False).flat
    losses.plot(range(1, 1 + len(trained)), trained, linewidth=0.8, label="of each step")
    lines = [(losses, "trained", "their mean"), (losses, "loss", "held out"), *((others[0], n, n) for n in names)]
    for axes, name, label in lines:
        points = [(one["step"], one[name]) for one in history if name in one]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    for axes, title in zip([losses, *others], ("loss", "of held-out records"), strict=False):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
