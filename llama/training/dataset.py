"""Training data: files of JSON lines, every line of which is checked before anything is trained.

    language  {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [..., {"role": "assistant", ...}]}
    classify  {"text": ..., "label": "name"}, {"text": ..., "labels": ["name", ...]} or {"text": ..., "label": 0.5}
    tag       {"text": ..., "spans": [{"start": 0, "end": 5, "label": "name"}, ...]}
    answer    {"question": ..., "context": ..., "answers": [{"text": ..., "start": 0}, ...]}, [] where there is none

Other keys are ignored. Places are characters of the text, ends exclusive. Knows no tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .._util.files import unreadable
from .._util.json_lines import parse_object
from .._util.validate import is_integer, is_number
from ..checkpoints.task_spec import ProblemType, Task
from ..errors import LlamaError, describe, pluralize, shorten

SHOWN = 5  # spoiled lines that an error names
OUTSIDE = "O"  # the label of tokens in no span


@dataclass(frozen=True)
class Record:
    """A line: its number in the file, and what it holds."""

    number: int
    given: dict[str, Any]


def read_records(path: str | Path, task: Task) -> list[Record]:
    """All lines that aren't empty. Raises LlamaError that names the lines that can't be used, and why."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise unreadable(Path(path), e) from e
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = Record(number, parse_object(line))
            CHECKS[task](record.given)
            records.append(record)
        except LlamaError as e:
            problems.append(f"line {number}: {e}")
    raise_all(path, problems)
    if not records:
        raise LlamaError(f"{path} has no lines: expected at least one to {task}")
    return records


def raise_all(path: str | Path, problems: Sequence[str]) -> None:
    """Raises LlamaError where there are any."""
    if problems:
        more = f"; and {pluralize(len(problems) - SHOWN, 'more line')}" if len(problems) > SHOWN else ""
        raise LlamaError(f"{path}: {'; '.join(problems[:SHOWN])}{more}")


def text_of(given: dict[str, Any], name: str) -> str:
    if name not in given:
        raise LlamaError(f"no {name}, expected a text")
    if not isinstance(given[name], str) or not given[name]:
        raise LlamaError(f"{name} is {describe(given[name])}, expected a text of at least one character")
    return given[name]


def check_language(given: dict[str, Any]) -> None:
    forms = [name for name in ("text", "prompt", "messages") if name in given]
    if len(forms) != 1:
        raise LlamaError(f"found {' and '.join(forms) or 'none'} of text, prompt and messages, expected one of them")
    if forms != ["messages"]:
        for name in ("prompt", "completion") if forms == ["prompt"] else forms:
            text_of(given, name)
        return
    messages = given["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise LlamaError(f"messages is {describe(messages)}, expected a list of messages")
    if messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise LlamaError("the last message isn't the assistant's, which is what is learnt")


def check_classify(given: dict[str, Any]) -> None:
    text_of(given, "text")
    if ("label" in given) == ("labels" in given):
        raise LlamaError("found neither or both of label and labels, expected one of them")
    if "labels" in given:
        labels = given["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
            raise LlamaError(f"labels is {shorten(labels)}, expected a list of names")
    elif not (isinstance(given["label"], str) and given["label"]) and not is_number(given["label"]):
        raise LlamaError(f"label is {shorten(given['label'])}, expected a name or a number")


def check_tag(given: dict[str, Any]) -> None:
    text, spans = text_of(given, "text"), given.get("spans")
    if not isinstance(spans, list):
        raise LlamaError(f"spans is {describe(spans)}, expected a list")
    for span in spans:
        start, end, label = (span.get(name) if isinstance(span, dict) else None for name in ("start", "end", "label"))
        if not isinstance(label, str) or not label or not is_integer(start, 0) or not is_integer(end, 0):
            raise LlamaError(f"a span is {shorten(span)}, expected start, end and label")
        if not start < end <= len(text):  # type: ignore[operator]
            raise LlamaError(f"a span is from {start} to {end} of a text of {len(text)} characters")
    for one, other in pairwise(sorted(spans, key=lambda span: span["start"])):
        if other["start"] < one["end"]:
            raise LlamaError(f"the spans at {one['start']} and {other['start']} overlap")


def check_answer(given: dict[str, Any]) -> None:
    text_of(given, "question")
    context, answers = text_of(given, "context"), given.get("answers")
    if not isinstance(answers, list):
        raise LlamaError(f"answers is {describe(answers)}, expected a list, empty where the context doesn't say")
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else None
        start = answer.get("start") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text or not is_integer(start, 0):
            raise LlamaError(f"an answer is {shorten(answer)}, expected text and start")
        if context[start : start + len(text)] != text:  # type: ignore[operator]
            raise LlamaError(f"the context doesn't say {shorten(text)} at character {start}")


CHECKS: dict[Task, Callable[[dict[str, Any]], None]] = {
    "language": check_language,
    "classify": check_classify,
    "tag": check_tag,
    "answer": check_answer,
}


def problem_of(records: Sequence[Record], path: str | Path) -> ProblemType:
    """What kind of labels texts have to be classified by. Raises LlamaError where lines differ in that."""
    kinds: dict[ProblemType, int] = {}
    for record in records:
        kind: ProblemType = "multi_label_classification"
        if "label" in record.given:
            kind = "single_label_classification" if isinstance(record.given["label"], str) else "regression"
        kinds.setdefault(kind, record.number)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise LlamaError(f"{path}: line {first} is {one} and line {second} {other}: expected one kind of labels")
    return next(iter(kinds))


def labels_in(records: Sequence[Record], task: Task, problem_type: ProblemType | None) -> list[str] | None:
    """The names of classes that a head to be trained on these needs, sorted; None where it has none to choose."""
    if task == "classify" and problem_type == "regression":
        return ["value"]
    if task == "classify":
        return sorted({label for one in records for label in one.given.get("labels", [one.given.get("label")])})
    if task == "tag":
        names = sorted({span["label"] for one in records for span in one.given["spans"]})
        return [OUTSIDE, *(f"{place}-{name}" for name in names for place in "BI")]
    return None
