"""A directory on disk -> (ModelArgs, this rank's tensors). Here formats and shard counts are met; past here there is
one layout, Meta's names and interleaved rotary pairs.

Knows where the tokenizer lies and not what is in it; knows no generation. Files come from strangers: nothing in them is
executed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._util.console import progress_bar
from ..accelerate.quantization import BITS, GROUP, Quantization, QuantizedMatrix, QuantizedRows
from ..errors import LlamaError
from ..model import ModelArgs, Transformer
from ..parallel import Place, together
from . import hf_config
from . import huggingface as hf_format
from . import meta as meta_format
from . import task_spec as head_format
from .compressed_tensors import SCALES, WORDS, check_groups, file_dtypes, file_shapes, wrong_shapes
from .download import is_url
from .schema import New, Stored, check_sizes, in_memory, is_linear, part_sizes, tensor_shapes
from .task_spec import HeadConfig, Task

Format = Literal["meta", "hf"]
CONFIG = {"meta": "params.json", "hf": "config.json"}
LOOKED_UP = 256  # rows of a rounded matrix whose numbers are made at a time
Take = Callable[[Transformer, str, QuantizedMatrix | None], None]


@dataclass
class Checkpoint:
    """What a directory was found to hold. With problems, what they left unknown is missing.

    directory: where the files lie, which may be the `original/` folder of the one that was asked for. family: as
    Hugging Face's configuration calls it; None in Meta's layout. task, head: what it was made for; language models have
    no head. quantization: how the matrices of layers are rounded; None: they aren't. tensors: by Meta's names, of
    rounded ones as `compressed` has them; head_tensors: the head's, by their own. problems: what is wrong with
    files; faults: those of them that are of one file, by its path; misfits: what is wrong with the tensors in whole
    files.
    """

    directory: Path
    format: Format
    args: ModelArgs | None = None
    family: str | None = None
    task: Task = "language"
    head: HeadConfig | None = None
    quantization: Quantization | None = None
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, Stored] = field(default_factory=dict)
    head_tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    faults: dict[Path, str] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)

    def blame(self, path: Path, problem: str) -> None:
        self.problems.append(problem)
        self.faults[path] = problem

    @property
    def config(self) -> Path:
        return self.directory / CONFIG[self.format]

    @property
    def sizes(self) -> ModelArgs:
        """`args` of a checkpoint without problems. Raises LlamaError in others, which left them unknown."""
        if self.args is None:
            raise LlamaError(f"{self.directory}: the model's sizes are unknown: {'; '.join(self.problems)}")
        return self.args

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["tok_embeddings.weight"].dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Of the tensor's numbers; of those that a rounded matrix stands for, the embedding's."""
        return self.dtype if self.is_rounded(name) else self.tensors[name].dtype

    @property
    def group(self) -> int:
        """How many numbers of a row ranks can't divide."""
        return 1 if self.quantization is None else GROUP[BITS[self.quantization]]

    def is_rounded(self, name: str) -> bool:
        return self.quantization is not None and is_linear(name)

    def quantized(
        self, name: str, mp_rank: int, mp_size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> QuantizedMatrix:
        """What one rank keeps of a rounded matrix, to be computed with in this dtype; device: None is the CPU."""
        bits = BITS[cast(Quantization, self.quantization)]
        parts = (self.tensors[key].part(self.sizes, mp_rank, mp_size, key) for key in (name + WORDS, name + SCALES))
        return QuantizedMatrix(QuantizedRows(*(part.to(device).contiguous() for part in parts)), bits, dtype)

    def part(self, name: str, mp_rank: int = 0, mp_size: int = 1, new: New = in_memory) -> Tensor:
        """What one rank keeps of the tensor; of a rounded matrix, the numbers that it stands for, in a `new` tensor."""
        if not self.is_rounded(name):
            return self.tensors[name].part(self.sizes, mp_rank, mp_size, name, new)
        quantized = self.quantized(name, mp_rank, mp_size, self.dtype)
        numbers = new((quantized.rows, quantized.columns), self.dtype)
        for rows in torch.arange(quantized.rows).split(LOOKED_UP):
            numbers[rows] = quantized.lookup(rows)
        return numbers


def find(ckpt_dir: str | os.PathLike) -> tuple[Path, Format]:
    """Where the checkpoint's files lie, and their layout. Raises LlamaError when nothing like one is there."""
    if not isinstance(ckpt_dir, (str, os.PathLike)) or ckpt_dir == "":
        raise LlamaError(f"ckpt_dir is {ckpt_dir!r}, expected the path of a checkpoint's directory")
    if is_url(ckpt_dir):
        raise LlamaError(f"{ckpt_dir} is a URL, which is read by what runs a model: expected a directory here")
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise LlamaError(f"ckpt_dir {directory}: found {found} there, expected a directory that holds a checkpoint")
    try:
        names = sorted(p.name for p in directory.iterdir())
    except OSError as e:
        raise LlamaError(f"ckpt_dir {directory} can't be read ({e.strerror})") from e
    original = directory / "original"
    if any(directory.glob("consolidated.*.pth")):
        return directory, "meta"
    if any(n.endswith(".safetensors") for n in names):
        return directory, "hf"
    if any(original.glob("consolidated.*.pth")):
        return original, "meta"
    if hf_format.INDEX in names:
        return directory, "hf"
    there = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    pickles = any(n.startswith("pytorch_model") for n in names)
    raise LlamaError(
        f"ckpt_dir {directory}: expected params.json and consolidated.00.pth, or config.json and model.safetensors, "
        f"found {there or 'an empty directory'}"
        + ("; pytorch_model*.bin is the older form: save it anew with transformers' save_pretrained" * pickles)
    )


def find_settings(checkpoint: Checkpoint, *names: str) -> list[Path]:
    """Those of these files around the tensors that a download has, in its directory or the one of `original/`."""
    directory = checkpoint.directory
    places = [directory, directory.parent if directory.name == "original" else directory / "original"]
    return [place / name for place in places for name in names if (place / name).is_file()]


def find_tokenizer(checkpoint: Checkpoint) -> Path:
    """The tokenizer's file that belongs to the layout, else the other's; where there is none, the one to expect."""
    names = ["tokenizer.model", "tokenizer.json"]
    if checkpoint.format == "hf":
        names.reverse()
    found = find_settings(checkpoint, *names)
    usable = [path for path in found if not is_binary(path)]
    return (usable or found or [checkpoint.directory / names[0]])[0]


def is_binary(path: Path) -> bool:
    """Whether it is a `tokenizer.model` that isn't text, and so isn't read: mostly a tokenizer.json is beside it."""
    try:
        with path.open("rb") as f:
            return path.name == "tokenizer.model" and b"\0" in f.read(4096)
    except OSError:
        return False  # who opens it next will say why


def survey(ckpt_dir: str | os.PathLike, thorough: bool = False) -> Checkpoint:
    """Look at all files of a checkpoint, whole or not; reads their headers only, and a few rows where the output layer
    may repeat the embedding. If `thorough`, all rows.

    Raises LlamaError when there is no checkpoint at all; whatever else is wrong is listed in the result.
    """
    checkpoint = Checkpoint(*find(ckpt_dir))
    spell: Callable[[str], str] = str
    gather: Callable[[list[dict[str, Tensor]], ModelArgs], tuple[dict[str, Stored], list[str]]] = meta_format.gather
    if checkpoint.format == "meta":
        contents = meta_contents(checkpoint, thorough)
    else:
        contents, spell = hf_contents(checkpoint), hf_format.hf_name
        gather = partial(hf_format.gather, thorough=thorough, quantization=checkpoint.quantization)
    if checkpoint.args is None:
        return checkpoint
    try:
        check_sizes(checkpoint.args)
        check_groups(checkpoint.args, checkpoint.quantization)
        if checkpoint.args.vocab_size < 1:
            raise LlamaError("vocab_size is -1, and no tok_embeddings.weight or output.weight tells how many words")
    except LlamaError as e:
        checkpoint.blame(checkpoint.config, f"{checkpoint.config}: {e}")
        checkpoint.args = None
        return checkpoint
    checkpoint.tensors, checkpoint.misfits = gather(contents, checkpoint.args)
    if not checkpoint.problems:  # else what is missing may lie in a file that is broken
        expected = file_shapes(checkpoint.args, checkpoint.quantization)
        absent = [name for name in expected if name not in checkpoint.tensors]
        checkpoint.misfits += [f"missing {spell(name)}" for name in absent]
        if checkpoint.head is not None:
            sizes = len(checkpoint.head.labels), checkpoint.args.dim
            checkpoint.misfits += head_format.misfits(checkpoint.head_tensors, checkpoint.task, *sizes)
    checkpoint.misfits += misfits(checkpoint)
    return checkpoint


def meta_contents(checkpoint: Checkpoint, thorough: bool) -> list[dict[str, Tensor]]:
    directory = checkpoint.directory
    params = attempt(checkpoint, meta_format.read_params, checkpoint.config)
    checkpoint.files = meta_format.shard_paths(directory)
    attempt(checkpoint, partial(meta_format.check_shards, shards=checkpoint.files), directory)
    shards = [attempt(checkpoint, meta_format.read_shard, path) for path in checkpoint.files]
    if checkpoint.problems:
        return []
    complete = partial(meta_format.complete_args, params=params, shards=shards, thorough=thorough)
    args = attempt(checkpoint, complete, checkpoint.config)
    if args is None:
        return []
    split = meta_format.ranks_by_shape(shards[0], args)
    if split > len(shards):
        here = f"{len(shards)} {'is' if len(shards) == 1 else 'are'} here"
        checkpoint.problems.append(
            f"{directory}: by the shape of its tensors the checkpoint was split in {split} shards, but "
            f"{here}: download the missing ones"
        )
        return []
    checkpoint.args = args
    return shards


def hf_contents(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    directory, config = checkpoint.directory, checkpoint.config
    if not config.is_file():
        checkpoint.blame(config, f"{config} is missing: it comes with the checkpoint, download it too")
    elif (found := attempt(checkpoint, hf_config.read_config, config)) is not None:
        checkpoint.family, checkpoint.args, checkpoint.quantization = found.family, found.args, found.quantization
        checkpoint.task, checkpoint.head = found.task, found.head
    files, places = attempt(checkpoint, hf_format.tensor_files, directory) or ([], {})
    if not any(path.exists() for path in files):  # the index is broken or gone, but there are files
        files = sorted({*files, *directory.glob("*.safetensors")})
    checkpoint.files = files
    contents = []
    for path in files:
        if not path.exists():
            why = f"which {hf_format.INDEX} names" if places else f"and there is no {hf_format.INDEX} that names others"
            checkpoint.blame(path, f"{path} is missing, {why}: download it")
            continue
        tensors = attempt(checkpoint, hf_format.read_file, path)
        if tensors is None:
            continue
        body, head = head_format.divided(tensors, checkpoint.task)
        contents.append(body)
        if repeated := sorted(head.keys() & checkpoint.head_tensors.keys()):
            checkpoint.blame(path, f"{path} has {repeated[0]}, and so has a file before it")
        checkpoint.head_tensors |= head
        if absent := [name for name, place in places.items() if place == path.name and name not in tensors]:
            checkpoint.blame(
                path,
                f"{path} has no {absent[0]}, where {hf_format.INDEX} places it ({len(absent)} such): "
                "are both of the same download?",
            )
    return contents


def attempt(checkpoint: Checkpoint, read: Callable[[Path], Any], path: Path) -> Any:
    """The result of reading, or None and a problem more."""
    try:
        return read(path)
    except LlamaError as e:
        checkpoint.blame(path, str(e))
    except RuntimeError as e:  # torch's, where the system won't map a file that is larger than all memory
        reason = " ".join(str(e).split())
        checkpoint.blame(path, f"{path} can't be mapped ({reason}): is it larger than the memory here?")
    return None


def misfits(checkpoint: Checkpoint) -> list[str]:
    """What is misshapen or of no use among the tensors, by the names that the files use."""
    shapes = file_shapes(checkpoint.sizes, checkpoint.quantization)
    problems = []
    for name, stored in checkpoint.tensors.items():
        if stored.shape != shapes[name]:
            problems.append(f"{stored.name} of shape {stored.shape}, expected {shapes[name]}")
        if stored.dtype not in (useful := file_dtypes(name)):
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in useful)
            problems.append(f"{stored.name} of {stored.dtype}, expected {'one of ' * (len(useful) > 1)}{expected}")
    return problems + wrong_shapes(checkpoint.tensors, checkpoint.sizes)


def open_checkpoint(ckpt_dir: str | os.PathLike) -> Checkpoint:
    """A thorough `survey` of a checkpoint of any layout. Raises LlamaError when anything is wrong."""
    checkpoint = survey(ckpt_dir, thorough=True)
    if len(problems := checkpoint.problems) > 1:
        raise LlamaError(f"{problems[0]} (and {len(problems) - 1} more: python -m llama inspect lists them)")
    if problems:
        raise LlamaError(problems[0])
    if wrong := checkpoint.misfits:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise LlamaError(
            f"{checkpoint.directory}: the tensors don't fit {checkpoint.config.name}: {'; '.join(wrong[:5])}{more}. "
            "Are both files of the same model?"
        )
    return checkpoint


class _LayersOnMeta(TorchDispatchMode):
    """Sends `torch.Tensor(rows, columns)`, which fairscale's layers call and `torch.device` doesn't reach, to meta; and
    leaves out their random numbers, which nobody would see."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for this, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.normal_.default:
            return args[0]
        if func is torch.ops.aten.empty.memory_format:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def build_on_meta(args: ModelArgs) -> Transformer:
    """The network of these sizes with shapes and no memory: a model to assign tensors to."""
    with torch.device("meta"), _LayersOnMeta():
        return Transformer(args)


def load_model(
    checkpoint: Checkpoint,
    args: ModelArgs,
    place: Place,
    take: Take | None = None,
) -> Transformer:
    """The Transformer of this rank with its weights. On the CPU, in the file's own dtype and layout, they stay mapped:
    all that are whole or cut along their rows.

    take(model, name, quantized) is called when the tensor `name` has its place, and may pack it before the next tensor
    comes. A matrix that the files hold quantized has no place yet, and comes as `quantized`; without `take`, as the
    numbers that its integers stand for. If one rank fails, every rank raises its LlamaError.
    """
    with together():
        model = build_on_meta(args)
        sizes = part_sizes(args, place.mp_size)
        total = sum(sizes.values()) * place.dtype.itemsize
        with progress_bar("loading", total, "B", delayed=True) as bar:
            for name in tensor_shapes(args):  # one by one: at most one tensor is held twice
                quantized = None
                if take is not None and checkpoint.is_rounded(name):
                    quantized = checkpoint.quantized(name, place.mp_rank, place.mp_size, place.dtype, place.device)
                else:
                    part = checkpoint.part(name, place.mp_rank, place.mp_size)
                    place_tensor(model, name, part.to(place.device, place.dtype).contiguous())
                    del part
                bar.update(sizes[name] * place.dtype.itemsize)
                if take is not None:
                    take(model, name, quantized)
    return model


def place_tensor(model: Transformer, name: str, tensor: Tensor) -> None:
    """Make it the model's parameter of this name."""
    owner, _, kind = name.rpartition(".")
    setattr(model.get_submodule(owner), kind, nn.Parameter(tensor))
    if name == "tok_embeddings.weight":
        model.tie_embeddings()
