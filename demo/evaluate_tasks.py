"""Measures models that were fine-tuned on demo/tasks.py's records, on the records held out, and prints the results.

    python -m demo.evaluate_tasks OUT

OUT/topics, OUT/places and OUT/questions each hold eval.jsonl and a model, as README.md's commands leave them.
"""

from pathlib import Path

from demo.templates import PARTS
from llama import TaskModel
from llama.checkpoints.task_spec import TaskName
from llama.cli.program import run
from llama.training.dataset import read_lines
from llama.training.evaluation import measure, predict

TASKS: dict[str, tuple[TaskName, str]] = {  # (task, metric) by the name of the records
    "topics": ("classify", "accuracy"),
    "places": ("tag", "f1"),
    "questions": ("answer", "exact_match"),
}


def main(out: str, device: str | None = None) -> None:
    print("task        all", *(f"{name:>14}" for name in ("known", "new templates", "new words", "both new")))
    for name, (task, metric) in TASKS.items():
        records = [line.record for line in read_lines(Path(out) / name / "eval.jsonl", task)]
        model = TaskModel.build(Path(out) / name / "model", max_batch_size=32, device=device)
        predictions, n = predict(model, records), len(PARTS)
        shares = [
            measure(task, predictions[i::n], records[i::n])[metric] for i in range(n)
        ]  # record i is of part i % n
        print(f"{name:10} {measure(task, predictions, records)[metric]:4.0%}", *(f"{share:14.0%}" for share in shares))


if __name__ == "__main__":
    run(main)
