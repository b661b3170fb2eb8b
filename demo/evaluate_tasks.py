"""Asks models that were fine-tuned on demo/tasks.py's records what was held out, and prints how much is right.

    python -m demo.evaluate_tasks OUT

OUT/topics, OUT/places and OUT/questions each have eval.jsonl and the model of it, as README.md's commands leave them.
"""

from pathlib import Path

from demo.templates import PARTS
from llama import TaskModel
from llama.checkpoints.task_spec import Task
from llama.cli.program import run
from llama.training.dataset import read_records
from llama.training.evaluation import compared, predicted

TASKS: dict[str, tuple[Task, str]] = {  # and by what it is measured
    "topics": ("classify", "accuracy"),
    "places": ("tag", "f1"),
    "questions": ("answer", "exact_match"),
}


def main(out: str, device: str | None = None) -> None:
    print("task        all", *(f"{name:>14}" for name in ("known", "new templates", "new words", "both new")))
    for name, (task, measure) in TASKS.items():
        records = [record.given for record in read_records(Path(out) / name / "eval.jsonl", task)]
        model = TaskModel.build(Path(out) / name / "model", max_batch_size=32, device=device)
        found, parts = predicted(model, records), len(PARTS)
        shares = [compared(task, found[i::parts], records[i::parts])[measure] for i in range(parts)]  # by demo/tasks.py
        print(f"{name:10} {compared(task, found, records)[measure]:4.0%}", *(f"{share:14.0%}" for share in shares))


if __name__ == "__main__":
    run(main)
