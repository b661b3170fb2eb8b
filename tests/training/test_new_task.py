"""A task is added outside of the package, by one record: it is trained, measured, saved, and loaded again."""

import json
from collections.abc import Iterator
from pathlib import Path

import letter_count
import pytest
import torch
from json_lines import write
from tiny_training import CPU, base

from llama import LlamaError, TaskModel
from llama.checkpoints.inspect import report_on
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.task_spec import SPECS
from llama.tasks.registry import TASKS
from llama.training.config import TrainingConfig
from llama.training.registry import TRAINING_TASKS, register
from llama.training.trainer import finetune

RECORDS = [{"text": "ab" * i + "c" * (9 - i), "count": i} for i in range(1, 9)]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(letter_count.TASK)
    yield
    for table in (SPECS, TASKS, TRAINING_TASKS):
        del table["count"]  # type: ignore[attr-defined]


def test_its_code_is_short() -> None:
    assert len(Path(letter_count.__file__).read_text().splitlines()) < 40


def test_it_is_trained_measured_saved_and_loaded(tmp_path: Path) -> None:
    base(tmp_path / "ckpt")
    data = str(write(tmp_path / "data.jsonl", RECORDS))
    config = TrainingConfig(
        "count", data, str(tmp_path / "out"), data, epochs=5, batch_size=4, learning_rate=3e-2, every=1
    )
    finetune(config, tmp_path / "ckpt", **CPU)
    progress = json.loads((tmp_path / "out" / "training.json").read_text())["progress"]
    assert progress["step"] == 10
    assert sum(progress["losses"][-2:]) < 0.6 * sum(progress["losses"][:2])
    closeness = [entry["closeness"] for entry in progress["history"]]
    assert closeness[-1] > closeness[0] and progress["best"] == max(closeness)

    model = TaskModel.build(tmp_path / "out", max_batch_size=8, **CPU)
    assert model.task == "count"
    with torch.no_grad():
        predictions = letter_count.predict(model, [record["text"] for record in RECORDS])
    measured = letter_count.measure(predictions, [record["count"] for record in RECORDS])
    assert measured["closeness"] == pytest.approx(max(closeness), abs=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForLetterCount"]
    assert report_on(open_checkpoint(tmp_path / "out")).task == "count"


def test_its_records_and_tensors_are_checked(tmp_path: Path) -> None:
    base(tmp_path / "ckpt")
    data = str(write(tmp_path / "data.jsonl", [*RECORDS, {"count": 1}]))
    with pytest.raises(LlamaError, match="line 9: no text, expected a text"):
        finetune(TrainingConfig("count", data, str(tmp_path / "out")), tmp_path / "ckpt", **CPU)
    with pytest.raises(LlamaError, match="there is a task 'count' already"):
        register(letter_count.TASK)
