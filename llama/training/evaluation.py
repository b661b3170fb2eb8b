"""How good a model in training is on held-out records, and the picture of its learning curves.

Knows tasks, their metrics and curves; knows no optimizer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._util.packages import find_missing, missing_error
from .._util.plots import create_figure, save_figure
from ..checkpoints.task_spec import TaskName
from ..errors import LlamaError
from ..tasks.model import TaskModel
from ..tasks.registry import TASKS
from .dataset import collate
from .preprocessing import Example
from .record_formats import Record
from .registry import TRAINING_TASKS


def check_packages(evaluates: bool) -> None:
    """Raise LlamaError unless the packages that draw the curves, and that measure, are installed."""
    if missing := find_missing("matplotlib", *["torchmetrics"] * evaluates):
        raise missing_error("training", *missing)


def is_regression(model: TaskModel) -> bool:
    """Whether the model predicts numbers. Then its loss alone is measured, whatever metrics the task has."""
    return model.checkpoint.head is not None and model.checkpoint.head.problem_type == "regression"


def choose_best_metric(model: TaskModel) -> str:
    """The name of the metric that decides which model is best."""
    return "loss" if is_regression(model) else TASKS[model.task].best_metric


@torch.no_grad()
def evaluate(model: TaskModel, examples: Sequence[Example], records: Sequence[Record]) -> dict[str, float]:
    """The loss and the task's metrics, by name, on records that weren't trained on. examples: of the same records."""
    loss = compute_loss(model, examples)
    measure_loss = TRAINING_TASKS[model.task].measure_loss
    metrics = {"loss": loss, **(measure_loss(loss) if measure_loss else {})}
    if TASKS[model.task].predict is None or is_regression(model):
        return metrics
    return metrics | measure(model.task, predict(model, records), records)


def compute_loss(model: TaskModel, examples: Sequence[Example]) -> float:
    """The mean loss over all items of the examples; see `Example.items`."""
    model.head.eval()
    total, items = 0.0, 0
    device, batch_size = model.model.device, model.model.params.max_batch_size
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for i in range(0, len(ordered), batch_size):
        batch = ordered[i : i + batch_size]
        output = model.head(**collate(batch, model.task, device))
        count = sum(example.items for example in batch)
        total += float(get_loss(output)) * count
        items += count
    return total / items


def get_loss(output: Any) -> torch.Tensor:
    """The loss in a head's output; CausalLM's output is the loss itself."""
    return output if isinstance(output, torch.Tensor) else output.loss


def predict(model: TaskModel, records: Sequence[Record]) -> list[Any]:
    """What the model predicts for each record: names of labels, spans (start, end, label), or the text of an answer.

    Called only for tasks that have a predictor.
    """
    get_input, predict_inputs = TRAINING_TASKS[model.task].get_input, TASKS[model.task].predict
    if get_input is None or predict_inputs is None:
        raise LlamaError(f"the task {model.task} has no predictor: its record needs get_input and predict")
    return predict_inputs(model, [get_input(record) for record in records])


def measure(task: TaskName, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
    """The task's metrics of predictions against what the records say. Called only for tasks that have a predictor."""
    get_expected, compare = TRAINING_TASKS[task].get_expected, TASKS[task].measure
    if get_expected is None or compare is None:
        raise LlamaError(f"the task {task} has no metrics: its record needs get_expected and measure")
    return compare(predictions, [get_expected(record) for record in records])


def draw_curves(losses: Sequence[float], history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses against steps, and beside them the metrics of held-out records.

    losses: of each step. history: see `Progress.history`.
    """
    names = sorted({name for entry in history for name in entry} - {"step", "epoch", "trained", "loss", "perplexity"})
    figure = create_figure(6 + 6 * bool(names), 4)
    loss_axes, *metric_axes = figure.subplots(1, 1 + bool(names), squeeze=False).flat
    loss_axes.plot(range(1, 1 + len(losses)), losses, linewidth=0.8, label="of each step")
    lines = [(loss_axes, "trained", "their mean"), (loss_axes, "loss", "held out")]
    lines += [(metric_axes[0], name, name) for name in names]
    for axes, name, label in lines:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    for axes, title in zip([loss_axes, *metric_axes], ("loss", "of held-out records"), strict=False):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
