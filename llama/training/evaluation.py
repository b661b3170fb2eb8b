"""How good a model in training is on records that it isn't trained on, and the picture of how that went.

Knows tasks, their metrics and curves; knows no optimizer. matplotlib is imported only here.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._util.files import write_whole
from .._util.validate import is_number
from ..checkpoints.task_spec import Task
from ..errors import LlamaError
from ..tasks.metrics import answer_metrics, classification_metrics, span_metrics
from ..tasks.model import TaskModel
from ..tasks.predict import AnswerOptions
from .dataset import Record
from .preprocessing import DOC_STRIDE, Example, collated

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
def measured(built: TaskModel, examples: Sequence[Example], records: Sequence[Record]) -> dict[str, float]:
    """The loss, and what its task's texts are measured by, of records that weren't trained on."""
    built.head.eval()
    total, items = 0.0, 0
    device, batch_size = built.model.device, built.model.params.max_batch_size
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for i in range(0, len(ordered), batch_size):
        batch = ordered[i : i + batch_size]
        found = built.head(**collated(batch, built.task, device))
        count = sum(example.items for example in batch)
        total += float(found if isinstance(found, torch.Tensor) else found.loss) * count
        items += count
    loss = total / items
    if built.task == "language":
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    given = [record.given for record in records]
    if built.task == "classify" and is_number(given[0].get("label")):
        return {"loss": loss}  # which says it all
    return {"loss": loss, **compared(built.task, predicted(built, given), given)}


def predicted(built: TaskModel, given: Sequence[dict[str, Any]]) -> list[Any]:
    """What the model makes of what records hold: for each a label, or a list of them, or spans, or an answer's text."""
    if built.task == "answer":
        options: AnswerOptions = {"doc_stride": DOC_STRIDE, "null_threshold": NULL_THRESHOLD}
        pairs = [(one["question"], one["context"]) for one in given]
        return [found[0].text for found in built.answer_all(pairs, **options)]
    texts = [one["text"] for one in given]
    if built.task == "tag":
        return [[(span.start, span.end, span.label) for span in found] for found in built.tag(texts)]
    named = [[one.label for one in found] for found in built.classify(texts)]
    return [found[0] if "label" in one else found for found, one in zip(named, given, strict=True)]


def compared(task: Task, found: Sequence[Any], given: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How much of what was predicted is what records say."""
    if task == "answer":
        return answer_metrics(found, [[answer["text"] for answer in one["answers"]] for one in given])
    if task == "tag":
        return span_metrics(found, [[(s["start"], s["end"], s["label"]) for s in one["spans"]] for one in given])
    return classification_metrics(found, [one["label"] if "label" in one else one["labels"] for one in given])


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
    write_whole(path, partial(figure.savefig, format="png"))
