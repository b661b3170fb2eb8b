"""A directory on disk -> the Transformer of this rank with its weights: checkpoints are found, opened and loaded.

Past this file there is one layout of tensors, with Meta's names and interleaved rotary pairs. Knows no format, which is
a record in `formats`; knows no tokenizer and no text. Files come from strangers: nothing in them is executed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import parallel
from .._util.console import progress_bar
from ..accelerate.accelerator import Acceleration, Accelerator
from ..accelerate.quantization import QuantizedMatrix, bits_of
from ..errors import LlamaError
from ..model import ModelArgs, Transformer
from ..parallel import Place, raise_together
from .checkpoint import Checkpoint, CheckpointFormat
from .compressed_tensors import check_groups, file_dtypes, file_shapes, find_wrong_shapes
from .download import cache_directory, copy_to_cache, is_url
from .fit import check_ranks, choose_quantization
from .formats import FORMATS
from .hf_head import find_head_problems
from .schema import check_sizes, memory_needed, part_sizes, tensor_shapes

LISTED_NAMES = 12  # of a directory, in messages
PackWeight = Callable[[Transformer, str, QuantizedMatrix | None], None]


# --- finding and opening --------------------------------------------------------------------------------------------


def find_checkpoint(ckpt_dir: str | os.PathLike) -> tuple[Path, CheckpointFormat]:
    """Where the checkpoint's files lie, and their format. Raises LlamaError where there are none."""
    if not isinstance(ckpt_dir, (str, os.PathLike)) or ckpt_dir == "":
        raise LlamaError(f"ckpt_dir is {ckpt_dir!r}, expected the path of a checkpoint's directory")
    if is_url(ckpt_dir):
        raise LlamaError(
            f"{ckpt_dir} is a URL, which only commands that run a model can read: expected a directory of this machine"
        )
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        content = "a file" if directory.exists() else "nothing"
        raise LlamaError(f"ckpt_dir {directory}: found {content} there, expected a directory that holds a checkpoint")
    try:
        names = sorted(p.name for p in directory.iterdir())
    except OSError as e:
        raise LlamaError(f"ckpt_dir {directory} can't be read ({e.strerror})") from e
    for patterns in zip_longest(*(format.patterns for format in FORMATS.values())):
        for format, pattern in zip(FORMATS.values(), patterns, strict=True):
            if pattern is not None and (path := next(directory.glob(pattern), None)) is not None:
                return path.parent, format
    expected = ", or ".join(f"{format.config} and {format.example}" for format in FORMATS.values())
    content = ", ".join(names[:LISTED_NAMES]) or "an empty directory"
    content += f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    pickles = any(n.startswith("pytorch_model") for n in names)
    raise LlamaError(
        f"ckpt_dir {directory}: expected {expected}, found {content}"
        + ("; pytorch_model*.bin is the older form: save it anew with transformers' save_pretrained" * pickles)
    )


def survey(ckpt_dir: str | os.PathLike, thorough: bool = False) -> Checkpoint:
    """Look at all files of a checkpoint, whole or not. Reads headers, and rows of matrices that may repeat each other.

    thorough: compare all of those rows instead of a few.
    Raises LlamaError where there is no checkpoint at all. Whatever else is wrong is listed in the result.
    """
    checkpoint = Checkpoint(*find_checkpoint(ckpt_dir))
    format = checkpoint.format
    contents = format.read(checkpoint, thorough)
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
    checkpoint.tensors, checkpoint.misfits = format.gather(checkpoint, contents, thorough)
    if not checkpoint.problems:  # else what is missing may lie in a file that is broken
        expected_names = file_shapes(checkpoint.args, checkpoint.quantization)
        absent = [name for name in expected_names if name not in checkpoint.tensors]
        checkpoint.misfits += [f"missing {format.spell(checkpoint, name)}" for name in absent]
        if checkpoint.head is not None:
            sizes = len(checkpoint.head.labels), checkpoint.args.dim
            checkpoint.misfits += find_head_problems(checkpoint.head_tensors, checkpoint.task, *sizes)
    checkpoint.misfits += find_tensor_problems(checkpoint)
    return checkpoint


def find_tensor_problems(checkpoint: Checkpoint) -> list[str]:
    """The wrong shapes and dtypes among the tensors, by their names in the files."""
    shapes = file_shapes(checkpoint.sizes, checkpoint.quantization)
    problems = []
    for name, stored in checkpoint.tensors.items():
        if stored.shape != shapes[name]:
            problems.append(f"{stored.name} of shape {stored.shape}, expected {shapes[name]}")
        if stored.dtype not in (dtypes := file_dtypes(name)):
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            problems.append(f"{stored.name} of {stored.dtype}, expected {'one of ' * (len(dtypes) > 1)}{expected}")
    return problems + find_wrong_shapes(checkpoint.tensors, checkpoint.sizes)


def open_checkpoint(ckpt_dir: str | os.PathLike) -> Checkpoint:
    """A thorough `survey` of a checkpoint of any format. Raises LlamaError if anything is wrong."""
    checkpoint = survey(ckpt_dir, thorough=True)
    if len(problems := checkpoint.problems) > 1:
        raise LlamaError(f"{problems[0]} (and {len(problems) - 1} more: python -m llama inspect lists them)")
    if problems:
        raise LlamaError(problems[0])
    if misfits := checkpoint.misfits:
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise LlamaError(
            f"{checkpoint.directory}: the tensors don't fit {checkpoint.config.name}: {'; '.join(misfits[:5])}{more}. "
            "Are both files of the same model?"
        )
    return checkpoint


# --- preparing: checks, before a tensor is loaded -------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedModel:
    """A model to generate with, before it is loaded."""

    checkpoint: Checkpoint
    args: ModelArgs  # with the sizes of the KV cache
    place: Place
    acceleration: Acceleration

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that a rank needs for (weights, KV cache)."""
        return memory_needed(self.args, self.place.mp_size, self.place.dtype, bits_of(self.acceleration.quantization))

    def load(self) -> Transformer:
        accelerator = Accelerator(self.acceleration)
        model = load_model(self.checkpoint, self.args, self.place, accelerator.pack_weight)
        accelerator.finish(model)
        return model


def fetch_checkpoint(ckpt_dir: str | Path) -> str | Path:
    """The checkpoint's directory on this machine, to which a URL is copied first. Called on all ranks alike."""
    if not is_url(ckpt_dir):
        return ckpt_dir
    with parallel.raise_together(parallel.new_long_timeout_group()):
        if parallel.is_machine_leader():
            copy_to_cache(str(ckpt_dir))
    return cache_directory(str(ckpt_dir))


def prepare_model(
    ckpt_dir: str | Path,
    place: Place,
    acceleration: Acceleration,
    max_seq_len: int,
    max_batch_size: int,
    use_file_dtype: bool,
) -> PreparedModel:
    """Open a checkpoint to generate with.

    use_file_dtype: compute in the dtype of the files instead of the place's.
    Raises LlamaError for a checkpoint that can't be loaded on these ranks.
    """
    checkpoint = open_checkpoint(ckpt_dir)
    check_generates(checkpoint)
    args, place = resolve_sizes(checkpoint, place, max_seq_len, max_batch_size, use_file_dtype)
    quantization = choose_quantization(checkpoint.directory, checkpoint.quantization, acceleration.quantization)
    return PreparedModel(checkpoint, args, place, replace(acceleration, quantization=quantization))


def check_generates(checkpoint: Checkpoint) -> None:
    """Raise LlamaError for a model that has a task head instead of an output layer."""
    if checkpoint.head is not None:
        raise LlamaError(
            f"{checkpoint.directory} has no output layer to generate with, but a head to {checkpoint.task} texts: "
            "llama.TaskModel.build reads it"
        )


def resolve_sizes(
    checkpoint: Checkpoint, place: Place, max_seq_len: int, max_batch_size: int, use_file_dtype: bool
) -> tuple[ModelArgs, Place]:
    """The sizes and the place to build a checkpoint's model with. Raises LlamaError if so many ranks can't run it."""
    args = replace(checkpoint.sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_ranks(checkpoint.directory, args, place.mp_size, checkpoint.group)
    return args, replace(place, dtype=checkpoint.dtype) if use_file_dtype else place


# --- loading --------------------------------------------------------------------------------------------------------


class _LayersOnMeta(TorchDispatchMode):
    """Makes fairscale's layers on the meta device, and skips their random numbers.

    They call `torch.Tensor(rows, columns)`, which ignores the device that `torch.device` sets.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.normal_.default:
            return args[0]
        if func is torch.ops.aten.empty.memory_format:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def build_on_meta(args: ModelArgs) -> Transformer:
    """The network of these sizes on the meta device: it takes no memory, and tensors can be assigned to it."""
    with torch.device("meta"), _LayersOnMeta():
        return Transformer(args)


def load_model(
    checkpoint: Checkpoint,
    args: ModelArgs,
    place: Place,
    pack_weight: PackWeight | None = None,
) -> Transformer:
    """The Transformer of this rank with its weights.

    On the CPU, and in the dtype of the file, a tensor stays mapped, unless its columns are divided over ranks or its
    rotary pairs are in another order.
    pack_weight(model, name, quantized) is called after each tensor, before the next one is read. quantized: None, and
    the tensor is in the model; or a matrix that is quantized in the files, which isn't in the model yet. Without
    `pack_weight`, such a matrix is dequantized.
    If one rank fails, every rank raises its LlamaError.
    """
    with raise_together():
        model = build_on_meta(args)
        sizes = part_sizes(args, place.mp_size)
        total = sum(sizes.values()) * place.dtype.itemsize
        with progress_bar("loading", total, "B", delayed=True) as bar:
            for name in tensor_shapes(args):  # one by one: at most one tensor is held twice
                quantized = None
                if pack_weight is not None and checkpoint.is_quantized(name):
                    quantized = checkpoint.quantized_part(name, place.mp_rank, place.mp_size, place.dtype, place.device)
                else:
                    part = checkpoint.part(name, place.mp_rank, place.mp_size)
                    place_tensor(model, name, part.to(place.device, place.dtype).contiguous())
                    del part
                bar.update(sizes[name] * place.dtype.itemsize)
                if pack_weight is not None:
                    pack_weight(model, name, quantized)
    return model


def place_tensor(model: Transformer, name: str, tensor: Tensor) -> None:
    """Make `tensor` the model's parameter of this name."""
    owner, _, kind = name.rpartition(".")
    setattr(model.get_submodule(owner), kind, nn.Parameter(tensor))
    if name == "tok_embeddings.weight":
        model.tie_embeddings()
