"""Record -> examples: rows of tokens with what is to be learnt of them; targets of a batch -> arguments of a head.

Knows tokenizers and tensors; knows no network and no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import LlamaError, shorten
from ..tasks.losses import IGNORED
from ..tasks.predict import DOC_STRIDE, encode_pairs
from ..tasks.spans import split_windows
from ..tokenization.dialog_rows import encode_rows
from ..tokenization.inputs import around_text, encode_whole
from ..tokenization.offsets import encode_with_offsets
from ..tokenization.protocol import AnyChatFormat, AnyTokenizer
from .record_formats import DIALOG_KEYS, OUTSIDE, Record

pad = partial(pad_sequence, batch_first=True)


@dataclass(frozen=True)
class Example:
    """A row of a batch."""

    tokens: list[int]
    target: Any  # a list of a label for each token; or what the task's head takes for the row: a label, (start, end)

    @property
    def items(self) -> int:
        """How many terms it adds to the mean of a loss."""
        return sum(label != IGNORED for label in self.target) if isinstance(self.target, list) else 1


@dataclass(frozen=True)
class Preprocessor:
    """What it takes to turn records into examples."""

    tokenizer: AnyTokenizer
    formatter: AnyChatFormat
    classes: Mapping[str, int]  # the index of each of the head's labels among its logits
    max_seq_len: int

    def find_class(self, label: str) -> int:
        if label not in self.classes:
            raise LlamaError(f"{shorten(label)} is no label of the head: known are {', '.join(self.classes)}")
        return self.classes[label]

    def check_length(self, tokens: list[int]) -> list[int]:
        """The tokens. Raises LlamaError if they are too many."""
        if len(tokens) > self.max_seq_len:
            raise LlamaError(
                f"{len(tokens)} tokens are more than max_seq_len {self.max_seq_len}: shorten it or raise max_seq_len"
            )
        return tokens


# --- record -> examples -----------------------------------------------------------------------------------------------


def read_language(preprocessor: Preprocessor, record: Record) -> list[Example]:
    """A text is cut into as many rows as it needs; of prompts and dialogs only the answers are learnt."""
    tokenizer, size = preprocessor.tokenizer, preprocessor.max_seq_len
    if "text" in record:
        tokens = tokenizer.encode(record["text"], bos=True, eos=True)
        rows = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        return [Example(row, [IGNORED, *row[1:]]) for row in rows]
    if "prompt" in record:
        prompt = tokenizer.encode(record["prompt"], bos=True, eos=False)
        answer = tokenizer.encode(record["completion"], bos=False, eos=True)
    else:
        options = {name: record[name] for name in DIALOG_KEYS if name in record}
        dialog_rows = encode_rows(preprocessor.formatter, record["messages"], **options)
        return [_learn(preprocessor.check_length(row.tokens), row.learnt) for row in dialog_rows]
    return [Example(preprocessor.check_length(prompt + answer), [IGNORED] * len(prompt) + answer)]


def _learn(tokens: list[int], learnt: list[bool]) -> Example:
    """An example of these tokens; the first isn't predicted by any, and so never learnt."""
    learnt = [False, *learnt[1:]]
    return Example(tokens, [token if flag else IGNORED for token, flag in zip(tokens, learnt, strict=True)])


def read_classify(preprocessor: Preprocessor, record: Record) -> list[Example]:
    """The target is a class, a tuple of 0.0 and 1.0 for all classes, or a tuple of one number."""
    tokens = preprocessor.check_length(encode_whole(preprocessor.tokenizer, record["text"]))
    label = record.get("label")
    if label is None:
        labels = {preprocessor.find_class(name) for name in record["labels"]}
        return [Example(tokens, tuple(float(i in labels) for i in range(len(preprocessor.classes))))]
    return [Example(tokens, preprocessor.find_class(label) if isinstance(label, str) else (float(label),))]


def read_tag(preprocessor: Preprocessor, record: Record) -> list[Example]:
    """The first token that overlaps a span begins it. A long text is cut into windows."""
    ids, offsets = encode_with_offsets(preprocessor.tokenizer, record["text"], bos=False)
    labels = [preprocessor.find_class(OUTSIDE)] * len(ids)
    for span in record["spans"]:
        begins = True
        for i, (start, end) in enumerate(offsets):
            if start < span["end"] and end > span["start"]:
                labels[i] = preprocessor.find_class(f"{'B' if begins else 'I'}-{span['label']}")
                begins = False
    around = around_text(preprocessor.tokenizer)
    ignored_before, ignored_after = [IGNORED] * len(around.before), [IGNORED] * len(around.after)
    room = preprocessor.max_seq_len - len(around.before) - len(around.after)
    return [
        Example([*around.before, *ids[start:end], *around.after], ignored_before + labels[start:end] + ignored_after)
        for start, end in split_windows(len(ids), room, 0)
    ]


def read_answer(preprocessor: Preprocessor, record: Record) -> list[Example]:
    """An example for each window of the context. Its target is (0, 0) if the window hasn't the whole answer."""
    pair = [(record["question"], record["context"])]
    _, (offsets,), windows = encode_pairs(preprocessor.tokenizer, pair, preprocessor.max_seq_len, DOC_STRIDE)
    examples = []
    for window in windows:
        target, before = (0, 0), window.first
        for answer in record["answers"][:1]:  # of several right answers, the first
            first, last = answer["start"], answer["start"] + len(answer["text"])
            overlapping = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
            if overlapping and window.start <= overlapping[0] and overlapping[-1] < window.end:
                target = before + overlapping[0] - window.start, before + overlapping[-1] - window.start
        examples.append(Example(window.tokens, target))
    return examples


# --- targets of a batch -> keyword arguments of the head --------------------------------------------------------------


def pad_labels(targets: Sequence[Any]) -> dict[str, Tensor]:
    """labels (B, T) from a label for each token, with IGNORED at padding."""
    return {"labels": pad([torch.tensor(target) for target in targets], padding_value=IGNORED)}


def stack_labels(targets: Sequence[Any]) -> dict[str, Tensor]:
    """labels (B) or (B, labels) from a label, or a tuple of numbers, for each row."""
    return {"labels": torch.tensor(targets)}


def stack_positions(targets: Sequence[Any]) -> dict[str, Tensor]:
    """start_positions and end_positions (B) from a pair for each row."""
    starts, ends = torch.tensor(targets).unbind(-1)
    return {"start_positions": starts, "end_positions": ends}
