"""What `inspect` says of a checkpoint's directory: a `CheckpointReport`, as text or JSON.

Knows values; looks at nothing itself.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..accelerate.quantization import Quantization
from ..errors import make_printable
from .report_text import TITLE_WIDTH, rows
from .task_spec import TaskName


@dataclass(frozen=True)
class File:
    """A file of tensors."""

    name: str
    bytes: int | None  # None: the file can't be read
    problem: str | None  # None: the file is whole


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer."""

    file: str
    kind: str  # a key of KINDS
    n_words: int
    stop_tokens: list[dict[str, Any]]  # each {"id": int, "name": str or None}
    chat: str | None  # a key of CHATS


@dataclass(frozen=True)
class Memory:
    """Bytes that weights and KV cache take."""

    mp_size: int
    max_seq_len: int
    max_batch_size: int
    dtype: str
    weights: int  # of one model-parallel rank
    kv_cache: int
    weights_in_all: int  # of all `mp_size` ranks
    kv_cache_in_all: int


@dataclass(frozen=True)
class CheckpointReport:
    """All that `inspect` says. What broken files leave unknown is None or empty.

    The fields are the keys of the JSON, which has "ok" before them.
    """

    directory: str  # where the files lie
    adapter: str | None  # the directory of the adapter that was looked at with them
    format: str  # a key of FORMATS: "meta" or "hf"
    family: str | None  # the published models that it is one of, for people
    task: TaskName  # "language", or the task of its head: "classify", "tag" or "answer"
    labels: list[str]  # of a head to classify or tag
    sizes: dict[str, Any] | None  # see `sizes_of`
    parameters: int | None  # how many numbers it has
    quantization: Quantization | None  # how matrices are quantized in the files; None: not at all
    dtypes: dict[str, int]  # name -> how many tensors have it
    files: list[File]
    has_output: bool  # whether it has an output layer or a head; without one, it only embeds texts
    tokenizer: Vocabulary | None
    memory: Memory | None
    mp_sizes: list[int]  # on how many ranks it runs
    notes: list[str]  # what was taken where the files leave it open
    problems: list[str]  # one line each, those of files too
    misfits: list[str]  # what is wrong with the tensors in whole files

    @property
    def ok(self) -> bool:
        """Whether there are neither problems nor misfits."""
        return not self.problems and not self.misfits

    def as_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def as_text(self) -> str:
        """Two columns. Control characters, which names of files may have, are replaced."""
        return "\n".join(f"{title:{TITLE_WIDTH}} {make_printable(text)}" for title, text in rows(self))
