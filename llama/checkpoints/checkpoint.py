"""What a checkpoint's directory holds, whatever its format: a `Checkpoint`; and what a format is: a `CheckpointFormat`.

Knows tensors and sizes; knows no particular format, and opens no file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..accelerate.quantization import BITS, GROUP, Quantization, QuantizedMatrix, QuantizedRows
from ..errors import LlamaError
from ..model import ModelArgs
from .compressed_tensors import SCALES, WORDS
from .families import FAMILIES, Family
from .hf_head import body_name
from .schema import New, Stored, allocate_in_memory, is_linear
from .task_spec import Body, HeadConfig, TaskName

T = TypeVar("T")
DEQUANTIZED_ROWS = 256  # of a quantized matrix, whose numbers are computed at a time
Contents = list[dict[str, Tensor]]  # of each file, its tensors by the names in it


@dataclass
class Checkpoint:
    """What lies in a directory. Where `problems` isn't empty, what could not be read is missing."""

    directory: Path  # of the files, maybe the `original/` folder of the directory that was asked for
    format: "CheckpointFormat"
    args: ModelArgs | None = None
    family: Family | None = None  # that of config.json; None where the format doesn't say
    task: TaskName = "language"  # what the model was trained for
    head: HeadConfig | None = None  # None for the task "language"
    has_output: bool = True  # False: neither an output layer nor a head, and `args` count as tied
    quantization: Quantization | None = None  # how the matrices of layers are quantized in the files; None: not at all
    files: list[Path] = field(default_factory=list)  # those with tensors
    tensors: dict[str, Stored] = field(default_factory=dict)  # by Meta's names, as `file_shapes` lists them
    head_tensors: dict[str, Tensor] = field(default_factory=dict)  # by the names in the files
    file_names: dict[str, str] = field(default_factory=dict)  # of tensors that files name without the usual prefix
    notes: list[str] = field(default_factory=list)  # what was taken where files leave it open, for people
    problems: list[str] = field(default_factory=list)  # what is wrong with files
    faults: dict[Path, str] = field(default_factory=dict)  # those of `problems` that a single file has
    misfits: list[str] = field(default_factory=list)  # what is wrong with the tensors of files that are whole
    adapter: Path | None = None  # the directory of an adapter, with which `args` and `tensors` are

    def blame(self, path: Path, problem: str) -> None:
        """Note what is wrong with a file."""
        self.problems.append(problem)
        self.faults[path] = problem

    def attempt(self, read: Callable[[Path], T], path: Path) -> T | None:
        """The result of read(path); or None, and a problem of this file."""
        try:
            return read(path)
        except LlamaError as e:
            self.blame(path, str(e))
        except RuntimeError as e:  # torch's, where the system won't map a file that is larger than all memory
            reason = " ".join(str(e).split())
            self.blame(path, f"{path} can't be mapped ({reason}): is it larger than the memory here?")
        return None

    @property
    def config(self) -> Path:
        """The file that has the sizes."""
        return self.directory / self.format.config

    @property
    def sizes(self) -> ModelArgs:
        """`args`, which are there if there are no problems. Raises LlamaError where they are unknown."""
        if self.args is None:
            raise LlamaError(f"{self.directory}: the model's sizes are unknown: {'; '.join(self.problems)}")
        return self.args

    @property
    def body(self) -> Body:
        """The prefix of the network's tensors in Hugging Face's files of this family and task."""
        return body_name(self.family or FAMILIES["llama"], self.task)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["tok_embeddings.weight"].dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the tensor; of a quantized matrix, that of the embedding, in which it is dequantized."""
        return self.dtype if self.is_quantized(name) else self.tensors[name].dtype

    @property
    def group(self) -> int:
        """How many neighbouring numbers of a row share a scale, so that ranks can't divide them."""
        return 1 if self.quantization is None else GROUP[BITS[self.quantization]]

    def is_quantized(self, name: str) -> bool:
        return self.quantization is not None and is_linear(name) and name not in self.tensors

    def quantized_part(
        self, name: str, mp_rank: int, mp_size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> QuantizedMatrix:
        """One rank's part of a quantized matrix, to compute with in this dtype. device: None is the CPU."""
        bits = BITS[cast(Quantization, self.quantization)]
        parts = (self.tensors[key].part(self.sizes, mp_rank, mp_size, key) for key in (name + WORDS, name + SCALES))
        return QuantizedMatrix(QuantizedRows(*(part.to(device).contiguous() for part in parts)), bits, dtype)

    def part(self, name: str, mp_rank: int = 0, mp_size: int = 1, new: New = allocate_in_memory) -> Tensor:
        """One rank's part of a tensor; a quantized matrix is dequantized into a `new` tensor."""
        if not self.is_quantized(name):
            return self.tensors[name].part(self.sizes, mp_rank, mp_size, name, new)
        quantized = self.quantized_part(name, mp_rank, mp_size, self.dtype)
        numbers = new((quantized.rows, quantized.columns), self.dtype)
        for rows in torch.arange(quantized.rows).split(DEQUANTIZED_ROWS):
            numbers[rows] = quantized.lookup(rows)
        return numbers


@dataclass(frozen=True)
class Export:
    """A checkpoint that is written in another format, or anew in its own."""

    checkpoint: Checkpoint
    mp_size: int  # for how many ranks the files are divided, where the format does that
    dtype: torch.dtype | None  # of all tensors; None: each keeps its own
    quantization: Quantization | None  # how matrices of layers are quantized; None: not at all
    source_config: Mapping[str, Any]  # the config.json of the same model in Hugging Face's format; {}: there is none


@dataclass(frozen=True)
class CheckpointFormat:
    """A format of checkpoints, as one record of `formats.FORMATS`."""

    name: str  # the key in FORMATS, as users write it
    label: str  # for people: the format's owner
    config: str  # the file with the sizes, without which nothing loads; it is written last
    example: str  # of a checkpoint's tensor files, for messages
    # Files that show the format. The checkpoint lies in the folder of the first. Each format's first pattern is looked
    # for before any format's second one.
    patterns: tuple[str, ...]
    # Patterns of the tensor files that `write` writes. Those of an older checkpoint are removed.
    written_patterns: tuple[str, ...]
    tokenizers: tuple[str, ...]  # names of tokenizer files, the format's own first
    holds_heads: bool  # whether a task head can be written
    holds_quantized: bool  # whether quantized matrices can be written
    holds_shards: bool  # whether the files are divided over ranks

    # (checkpoint, thorough): read the files' headers into the checkpoint's fields, all but `tensors`. Problems are
    # noted there. thorough: compare tensors that may repeat each other in all rows instead of a few.
    read: Callable[[Checkpoint, bool], Contents]
    # (checkpoint with args, what `read` returned, thorough): whole tensors by Meta's names, and misfits.
    gather: Callable[[Checkpoint, Contents, bool], tuple[dict[str, Stored], list[str]]]
    # Meta's name of a tensor -> the one in this checkpoint's files.
    spell: Callable[[Checkpoint, str], str]

    make_config: Callable[[Export], dict[str, Any]]  # what `config` shall hold
    # (export, `make_config`'s result, bytes of each tensor in files by name, directory): write all but `config`.
    write: Callable[[Export, Mapping[str, Any], Mapping[str, int], Path], None]
    largest_file: Callable[[int, int], int]  # (bytes of all tensors, mp_size): bytes of the largest file
