"""Makes training and held-out examples for three things that a model can be fine-tuned to do.

    python -m demo.tasks topics|places|questions --output DIR [--seed 1]

Writes DIR/train.jsonl and DIR/eval.jsonl, a JSON object a line; demo/topics.py, demo/places.py and demo/questions.py
say what is in it. Knows nothing of models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from demo.places import tagged
from demo.questions import question
from demo.templates import PARTS, SEEN, Part
from demo.topics import topic
from llama import LlamaError
from llama._util.files import write_whole
from llama.cli.program import run
from llama.errors import describe

EVALUATED = 400


@dataclass(frozen=True)
class Task:
    """make: one record, of a part. text: the field of it that never occurs twice. trained: how many for training."""

    make: Callable[[Random, Part], dict]
    text: str
    trained: int


TASKS = {
    "topics": Task(topic, "text", 3000),
    "places": Task(tagged, "text", 3000),
    "questions": Task(question, "context", 6000),
}


def examples(name: str, seed: int = 1) -> tuple[list[dict], list[dict]]:
    """Records for training and held-out ones, all different; the same ones for the same seed, everywhere.

    Held-out record i is made of PARTS[i % 4]: of the templates and words that training sees, of templates put aside, of
    words put aside, of both.
    """
    if name not in TASKS:
        raise LlamaError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
    if type(seed) is not int or seed < 0:
        raise LlamaError(f"seed is {describe(seed)}, expected a whole number from 0 on")
    task, rng = TASKS[name], Random(seed)
    made = different(task, rng)
    trained = [made(SEEN) for _ in range(task.trained)]
    return trained, [made(PARTS[i % len(PARTS)]) for i in range(EVALUATED)]


def different(task: Task, rng: Random) -> Callable[[Part], dict]:
    """Makes records of which none has the text of another."""
    seen = set()

    def made(part: Part) -> dict:
        while (record := task.make(rng, part))[task.text] in seen:
            pass
        seen.add(record[task.text])
        return record

    return made


def write_records(path: Path, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
    write_whole(path, lambda f: f.writelines(lines))


def main(task: str, output: str, seed: int = 1) -> None:
    if isinstance(output, bool):  # what fire makes of an option without a value
        raise LlamaError("--output has no value: give the directory to write train.jsonl and eval.jsonl to")
    directory = Path(str(output))
    for name, records in zip(("train", "eval"), examples(task, seed), strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / f"{name}.jsonl", records)
        print(f"{len(records)} records -> {directory / name}.jsonl")


if __name__ == "__main__":
    run(main)
