"""What a record of each task holds: its checks, its classes, the model's input and the expected prediction.

    language  {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [..., {"role": "assistant", ...}]}, with
              which "tools", "documents" and "chat_template_kwargs" may stand
    classify  {"text": ..., "label": "name"}, {"text": ..., "labels": ["name", ...]} or {"text": ..., "label": 0.5}
    tag       {"text": ..., "spans": [{"start": 0, "end": 5, "label": "name"}, ...]}
    answer    {"question": ..., "context": ..., "answers": [{"text": ..., "start": 0}, ...]}, [] if there is no answer

Other keys are ignored. Positions are characters of the text, ends exclusive. Knows plain values; knows no files and no
tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .._util.validate import is_integer, is_number
from ..checkpoints.task_spec import ProblemType
from ..errors import LlamaError, describe, shorten

Record = dict[str, Any]
DIALOG_KEYS = "tools", "documents", "chat_template_kwargs"  # that go with messages, for the chat template
OUTSIDE = "O"  # the label of tokens in no span


# --- checks: each raises LlamaError for a record that can't be used ---------------------------------------------------


def check_text(record: Record, name: str) -> str:
    """The text under this key. Raises LlamaError if there is none."""
    if name not in record:
        raise LlamaError(f"no {name}, expected a text")
    if not isinstance(record[name], str) or not record[name]:
        raise LlamaError(f"{name} is {describe(record[name])}, expected a text of at least one character")
    return record[name]


def check_language(record: Record) -> None:
    forms = [name for name in ("text", "prompt", "messages") if name in record]
    if len(forms) != 1:
        raise LlamaError(f"found {' and '.join(forms) or 'none'} of text, prompt and messages, expected one of them")
    if forms != ["messages"]:
        for name in ("prompt", "completion") if forms == ["prompt"] else forms:
            check_text(record, name)
        return
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise LlamaError(f"messages is {describe(messages)}, expected a list of messages")
    last = messages[-1]
    if last.get("role") != "assistant" or not (isinstance(last.get("content"), str | list) or last.get("tool_calls")):
        raise LlamaError("the last message isn't the assistant's, which is what is learnt")


def check_classify(record: Record) -> None:
    check_text(record, "text")
    if ("label" in record) == ("labels" in record):
        raise LlamaError("found neither or both of label and labels, expected one of them")
    if "labels" in record:
        labels = record["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
            raise LlamaError(f"labels is {shorten(labels)}, expected a list of names")
    elif not (isinstance(record["label"], str) and record["label"]) and not is_number(record["label"]):
        raise LlamaError(f"label is {shorten(record['label'])}, expected a name or a number")


def check_tag(record: Record) -> None:
    text, spans = check_text(record, "text"), record.get("spans")
    if not isinstance(spans, list):
        raise LlamaError(f"spans is {describe(spans)}, expected a list")
    for span in spans:
        start, end, label = (span.get(name) if isinstance(span, dict) else None for name in ("start", "end", "label"))
        if not isinstance(label, str) or not label or not is_integer(start, 0) or not is_integer(end, 0):
            raise LlamaError(f"a span is {shorten(span)}, expected start, end and label")
        if not start < end <= len(text):  # type: ignore[operator]
            raise LlamaError(f"a span is from {start} to {end} of a text of {len(text)} characters")
    for span, following in pairwise(sorted(spans, key=lambda span: span["start"])):
        if following["start"] < span["end"]:
            raise LlamaError(f"the spans at {span['start']} and {following['start']} overlap")


def check_answer(record: Record) -> None:
    check_text(record, "question")
    context, answers = check_text(record, "context"), record.get("answers")
    if not isinstance(answers, list):
        raise LlamaError(f"answers is {describe(answers)}, expected a list, empty where the context doesn't say")
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else None
        start = answer.get("start") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text or not is_integer(start, 0):
            raise LlamaError(f"an answer is {shorten(answer)}, expected text and start")
        if context[start : start + len(text)] != text:  # type: ignore[operator]
            raise LlamaError(f"the context doesn't say {shorten(text)} at character {start}")


# --- classes ----------------------------------------------------------------------------------------------------------


def find_problem_type(record: Record) -> ProblemType:
    """The kind of labels that a record to classify has."""
    if "label" not in record:
        return "multi_label_classification"
    return "single_label_classification" if isinstance(record["label"], str) else "regression"


def name_classes(records: Sequence[Record]) -> list[str]:
    """The classes that records to classify name, sorted; a regression has a single output, "value"."""
    if find_problem_type(records[0]) == "regression":
        return ["value"]
    return sorted({label for record in records for label in record.get("labels", [record.get("label")])})


def name_tags(records: Sequence[Record]) -> list[str]:
    """The classes of tokens, in the BIO scheme, for the labels of spans that records name."""
    names = sorted({span["label"] for record in records for span in record["spans"]})
    return [OUTSIDE, *(f"{position}-{name}" for name in names for position in "BI")]


# --- the input of the model, and what it should predict ---------------------------------------------------------------


def get_text(record: Record) -> str:
    return record["text"]


def get_pair(record: Record) -> tuple[str, str]:
    return record["question"], record["context"]


def get_labels(record: Record) -> list[str]:
    return [record["label"]] if "label" in record else record["labels"]


def get_spans(record: Record) -> list[tuple[int, int, str]]:
    return [(span["start"], span["end"], span["label"]) for span in record["spans"]]


def get_answers(record: Record) -> list[str]:
    return [answer["text"] for answer in record["answers"]]
