"""Asks models that were fine-tuned on demo/tasks.py's records what was held out, and prints how much is right.

    python -m demo.evaluate_tasks OUT

OUT/topics, OUT/places and OUT/questions each have eval.jsonl and the model of it, as README.md's commands leave them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.templates import PARTS
from llama import TaskModel
from llama.cli import run
from llama.head_format import Task
from llama.metrics import answer_metrics, classification_metrics, span_metrics
from llama.records import read_records

Records = Sequence[dict[str, Any]]


def topics(model: TaskModel, records: Records) -> list[Any]:
    return [labels[0].label for labels in model.classify([one["text"] for one in records])]


def places(model: TaskModel, records: Records) -> list[Any]:
    return [[(s.start, s.end, s.label) for s in spans] for spans in model.tag([one["text"] for one in records])]


def questions(model: TaskModel, records: Records) -> list[Any]:
    found = model.answer_all([(one["question"], one["context"]) for one in records], null_threshold=0.0)
    return [answers[0].text for answers in found]


def right_topics(found: list[Any], records: Records) -> float:
    return classification_metrics(found, [one["label"] for one in records])["accuracy"]


def right_places(found: list[Any], records: Records) -> float:
    wanted = [[(s["start"], s["end"], s["label"]) for s in one["spans"]] for one in records]
    return span_metrics(found, wanted)["f1"]


def right_answers(found: list[Any], records: Records) -> float:
    return answer_metrics(found, [[answer["text"] for answer in one["answers"]] for one in records])["exact_match"]


Found = Callable[[TaskModel, Records], list[Any]]
ASKED: dict[str, tuple[Task, Found, Callable[[list[Any], Records], float]]] = {
    "topics": ("classify", topics, right_topics),
    "places": ("tag", places, right_places),
    "questions": ("answer", questions, right_answers),
}


def main(out: str, device: str | None = None) -> None:
    print("task        all", *(f"{name:>14}" for name in ("known", "new templates", "new words", "both new")))
    for name, (task, found_by, measure) in ASKED.items():
        records = [record.given for record in read_records(Path(out) / name / "eval.jsonl", task)]
        model = TaskModel.build(Path(out) / name / "model", max_batch_size=32, device=device)
        found, parts = found_by(model, records), len(PARTS)
        shares = [measure(found[i::parts], records[i::parts]) for i in range(parts)]  # as demo/tasks.py lays them out
        print(f"{name:10} {measure(found, records):4.0%}", *(f"{share:14.0%}" for share in shares))


if __name__ == "__main__":
    run(main)
