"""Records -> rows of tokens with what is to be learnt of them -> batches that a head takes.

Knows tokenizers and tensors; knows no network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints.task_spec import Task
from ..errors import LlamaError
from ..tasks.losses import IGNORED
from ..tasks.predict import laid_out
from ..tasks.spans import windows
from ..tokenization.offsets import encode_with_offsets
from ..tokenization.protocol import AnyChatFormat, AnyTokenizer
from .dataset import OUTSIDE, Record, raise_all

DOC_STRIDE = 128  # tokens that windows of a context have in common


@dataclass(frozen=True)
class Example:
    """A row. target: as the task's head takes it: a label for each token, of the text, or (start, end)."""

    tokens: list[int]
    target: Any

    @property
    def items(self) -> int:
        """How much is to be learnt of it: what the mean of a loss runs over."""
        return sum(label != IGNORED for label in self.target) if isinstance(self.target, list) else 1


@dataclass(frozen=True)
class Preprocessor:
    """What turns records into examples. places: of the head's labels, among its logits."""

    tokenizer: AnyTokenizer
    formatter: AnyChatFormat
    places: Mapping[str, int]
    max_seq_len: int


def examples(reader: Preprocessor, task: Task, records: Sequence[Record], path: str | Path) -> list[Example]:
    """Of all records; a long one may give several. Raises LlamaError that names the lines that don't fit."""
    found: list[Example] = []
    problems = []
    for record in records:
        try:
            found += READERS[task](reader, record.given)
        except LlamaError as e:
            problems.append(f"line {record.number}: {e}")
    raise_all(path, problems)
    learnt = [example for example in found if example.items]
    if records and not learnt:
        raise LlamaError(f"{path}: nothing is learnt of any line within max_seq_len {reader.max_seq_len}: raise that")
    return learnt


def of_language(reader: Preprocessor, given: dict[str, Any]) -> list[Example]:
    """A text is cut into as many rows as it needs; of prompts and dialogs only the answer is learnt."""
    tokenizer = reader.tokenizer
    if "text" in given:
        tokens = tokenizer.encode(given["text"], bos=True, eos=True)
        rows = [tokens[i : i + reader.max_seq_len] for i in range(0, len(tokens), reader.max_seq_len)]
        return [Example(row, [IGNORED, *row[1:]]) for row in rows]
    if "prompt" in given:
        prompt = tokenizer.encode(given["prompt"], bos=True, eos=False)
        answer = tokenizer.encode(given["completion"], bos=False, eos=True)
    else:
        *before, last = given["messages"]
        prompt = reader.formatter.encode_dialog_prompt(before)
        answer = tokenizer.encode(last["content"], bos=False, eos=False)
        answer.append(reader.formatter.end_of_turn)
    return [Example(fitting(reader, prompt + answer), [IGNORED] * len(prompt) + answer)]


def of_class(reader: Preprocessor, given: dict[str, Any]) -> list[Example]:
    tokens = fitting(reader, reader.tokenizer.encode(given["text"], bos=True, eos=False))
    label = given.get("label")
    if label is None:
        wanted = {place_of(name, reader) for name in given["labels"]}
        return [Example(tokens, tuple(float(i in wanted) for i in range(len(reader.places))))]
    return [Example(tokens, place_of(label, reader) if isinstance(label, str) else (float(label),))]


def of_tags(reader: Preprocessor, given: dict[str, Any]) -> list[Example]:
    """The first token that touches a span begins it. A long text is cut into windows, as `answering.tag` reads it."""
    ids, offsets = encode_with_offsets(reader.tokenizer, given["text"], bos=False)
    labels = [place_of(OUTSIDE, reader)] * len(ids)
    for span in given["spans"]:
        begins = True
        for i, (start, end) in enumerate(offsets):
            if start < span["end"] and end > span["start"]:
                labels[i] = place_of(f"{'B' if begins else 'I'}-{span['label']}", reader)
                begins = False
    prefix = reader.tokenizer.encode("", bos=True, eos=False)
    return [
        Example(prefix + ids[start:end], [IGNORED] * len(prefix) + labels[start:end])
        for start, end in windows(len(ids), reader.max_seq_len - len(prefix), 0)
    ]


def of_answers(reader: Preprocessor, given: dict[str, Any]) -> list[Example]:
    """A row for each window of the context; where a window hasn't the whole answer, position 0 says so."""
    pair = [(given["question"], given["context"])]
    _, (offsets,), places = laid_out(reader.tokenizer, pair, reader.max_seq_len, DOC_STRIDE)
    found = []
    for place in places:
        target, before = (0, 0), len(place.tokens) - (place.end - place.start)
        for answer in given["answers"][:1]:  # of several right ones, the first
            first, last = answer["start"], answer["start"] + len(answer["text"])
            own = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
            if own and place.start <= own[0] and own[-1] < place.end:
                target = before + own[0] - place.start, before + own[-1] - place.start
        found.append(Example(place.tokens, target))
    return found


READERS: dict[Task, Callable[[Preprocessor, dict[str, Any]], list[Example]]] = {
    "language": of_language,
    "classify": of_class,
    "tag": of_tags,
    "answer": of_answers,
}


def place_of(label: str, reader: Preprocessor) -> int:
    if label not in reader.places:
        raise LlamaError(f"{label!r} is no label of the head: known are {', '.join(reader.places)}")
    return reader.places[label]


def fitting(reader: Preprocessor, tokens: list[int]) -> list[int]:
    if len(tokens) > reader.max_seq_len:
        raise LlamaError(
            f"{len(tokens)} tokens are more than max_seq_len {reader.max_seq_len}: shorten it or raise that"
        )
    return tokens


def collated(batch: Sequence[Example], task: Task, device: torch.device) -> dict[str, Tensor]:
    """What the task's head takes, right-padded: tokens (B, T), lengths (B), and the targets."""
    padded = partial(pad_sequence, batch_first=True)
    found = {
        "tokens": padded([torch.tensor(one.tokens) for one in batch]),
        "lengths": torch.tensor([len(one.tokens) for one in batch]),
    }
    targets = [torch.tensor(one.target) for one in batch]
    if task in ("language", "tag"):
        found["labels"] = padded(targets, padding_value=IGNORED)
    elif task == "classify":
        found["labels"] = torch.stack(targets)
    else:
        found["start_positions"], found["end_positions"] = torch.stack(targets).unbind(-1)
    return {name: tensor.to(device) for name, tensor in found.items()}
