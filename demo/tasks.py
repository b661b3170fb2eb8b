"""Makes training and held-out records for three things that a model can be fine-tuned to do.

    python -m demo.tasks topics|places|questions --output DIR [--seed 1]

Writes DIR/train.jsonl and DIR/eval.jsonl, a JSON object a line. What the records hold is in demo/topics.py,
demo/places.py and demo/questions.py. Knows nothing of models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from demo.places import make_place_record
from demo.questions import make_question_record
from demo.templates import PARTS, SEEN, Part
from demo.topics import make_topic_record
from llama import LlamaError
from llama._util.files import write_whole
from llama.cli.program import run
from llama.errors import describe

EVALUATED = 400  # held-out records


@dataclass(frozen=True)
class RecordKind:
    """How the records of one task are made."""

    make: Callable[[Random, Part], dict]  # a record from the templates and words of a part
    text: str  # the field whose value never occurs twice
    trained: int  # records for training


KINDS = {
    "topics": RecordKind(make_topic_record, "text", 3000),
    "places": RecordKind(make_place_record, "text", 3000),
    "questions": RecordKind(make_question_record, "context", 6000),
}


def make_records(name: str, seed: int = 1) -> tuple[list[dict], list[dict]]:
    """(records for training, held-out records), all different; the same on every machine for the same seed.

    Held-out record i is made from PARTS[i % 4]: the templates and words that training sees, new templates, new words,
    new templates and words.
    """
    if name not in KINDS:
        raise LlamaError(f"there is no task {name!r}: choose one of {', '.join(KINDS)}")
    if type(seed) is not int or seed < 0:
        raise LlamaError(f"seed is {describe(seed)}, expected a whole number from 0 on")
    kind, rng = KINDS[name], Random(seed)
    texts: set[str] = set()
    trained = [make_new_record(kind, rng, SEEN, texts) for _ in range(kind.trained)]
    return trained, [make_new_record(kind, rng, PARTS[i % len(PARTS)], texts) for i in range(EVALUATED)]


def make_new_record(kind: RecordKind, rng: Random, part: Part, texts: set[str]) -> dict:
    """A record whose text isn't among `texts`, to which it is added."""
    while (record := kind.make(rng, part))[kind.text] in texts:
        pass
    texts.add(record[kind.text])
    return record


def write_records(path: Path, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
    write_whole(path, lambda f: f.writelines(lines))


def main(task: str, output: str, seed: int = 1) -> None:
    if isinstance(output, bool):  # fire's value for an option without one
        raise LlamaError("--output has no value: give the directory to write train.jsonl and eval.jsonl to")
    directory = Path(str(output))
    for name, records in zip(("train", "eval"), make_records(task, seed), strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / f"{name}.jsonl", records)
        print(f"{len(records)} records -> {directory / name}.jsonl")


if __name__ == "__main__":
    run(main)
