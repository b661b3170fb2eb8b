"""A directory on disk -> the Transformer of this rank with its weights: checkpoints are found, opened and loaded.

Past this file there is one layout of tensors, with Meta's names and interleaved rotary pairs. Knows no format, which is
a record in `formats`; knows no tokenizer and no text. Files come from strangers: nothing in them is executed.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import parallel
from .._util.console import print_note, progress_bar
from .._util.files import check_expanded, describe_failure, describe_missing
from .._util.ranks import new_long_timeout_group
from .._util.urls import check_url, is_url
from .._util.validate import is_number
from ..accelerate.accelerator import Acceleration, Accelerator
from ..accelerate.quantization import QuantizedMatrix, bits_of
from ..errors import LlamaError, make_printable, shorten
from ..model import ModelArgs, Transformer
from ..parallel import Place, raise_together
from ..tokenization.protocol import AnyTokenizer
from .checkpoint import Checkpoint, CheckpointFormat
from .compressed_tensors import check_groups, file_dtypes, file_shapes, find_wrong_shapes
from .download import cache_directory, copy_to_cache
from .fit import check_draft, check_memory, check_ranks, check_vocabulary, choose_quantization
from .formats import FORMATS
from .hf_head import find_head_problems
from .schema import check_sizes, memory_needed, part_sizes, tensor_shapes
from .side_files import find_broken_links
from .wrong_path import next_step

ADAPTER_CONFIG = "adapter_config.json"  # what shows that a directory holds an adapter of peft's
LISTED_NAMES = 12  # of a directory, in messages
PathOrNone = TypeVar("PathOrNone", str | Path, str | Path | None)
PackWeight = Callable[[Transformer, str, QuantizedMatrix | None], None]


# --- finding and opening --------------------------------------------------------------------------------------------


def holds_adapter(ckpt_dir: object) -> bool:
    """Whether it is a directory of this machine in which peft has written an adapter."""
    is_path = isinstance(ckpt_dir, str | os.PathLike) and not is_url(ckpt_dir)
    return is_path and os.path.exists(Path(ckpt_dir) / ADAPTER_CONFIG)  # type: ignore[arg-type]


def find_checkpoint(ckpt_dir: str | os.PathLike, argument: str = "ckpt_dir") -> tuple[Path, CheckpointFormat]:
    """Where the checkpoint's files lie, and their format. Raises LlamaError where there are none.

    argument: what the caller calls `ckpt_dir`, for messages.
    """
    if not isinstance(ckpt_dir, (str, os.PathLike)) or ckpt_dir == "" or "\0" in str(ckpt_dir):
        raise LlamaError(f"{argument} is {shorten(ckpt_dir)}, expected the path of a checkpoint's directory")
    if is_url(ckpt_dir):
        check_url(str(ckpt_dir))
        raise LlamaError(
            f"{ckpt_dir} is a URL, which only commands that run a model can read: expected a directory of this machine"
        )
    directory = Path(ckpt_dir)
    try:
        if not directory.is_dir():
            check_expanded(directory)
            content = "a file" if directory.exists() else "nothing"
            raise LlamaError(
                f"{argument} {directory}: found {content} there, expected a directory that holds a checkpoint"
                + next_step(directory, holds_checkpoint)
            )
        names = sorted(p.name for p in directory.iterdir())
    except OSError as e:
        raise LlamaError(f"{argument} {shorten(str(directory))} can't be read ({describe_failure(e)})") from e
    if holds_adapter(directory) and not any((directory / format.config).exists() for format in FORMATS.values()):
        raise LlamaError(
            f"{argument} {directory} holds an adapter ({ADAPTER_CONFIG}) and no model: give the directory of its base, "
            "and this one as adapter_dir"
        )
    if (match := match_format(directory)) is not None:
        return match
    expected = ", or ".join(f"{format.config} and {format.example}" for format in FORMATS.values())
    content = ", ".join(names[:LISTED_NAMES]) or "an empty directory"
    content += f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    pickles = any(n.startswith("pytorch_model") for n in names)
    raise LlamaError(
        f"{argument} {directory}: expected {expected}, found {content}"
        + ("; pytorch_model*.bin is the older form: save it anew with transformers' save_pretrained" * pickles)
        + next_step(directory, holds_checkpoint)
    )


def match_format(directory: Path) -> tuple[Path, CheckpointFormat] | None:
    """Where in `directory` the files of a format lie, and the format; None if there are none."""
    for patterns in zip_longest(*(format.patterns for format in FORMATS.values())):
        for format, pattern in zip(FORMATS.values(), patterns, strict=True):
            if pattern is not None and (path := next(directory.glob(pattern), None)) is not None:
                return path.parent, format
    return None


def holds_checkpoint(directory: Path) -> bool:
    return match_format(directory) is not None


def survey(ckpt_dir: str | os.PathLike, thorough: bool = False, *, argument: str = "ckpt_dir") -> Checkpoint:
    """Look at all files of a checkpoint, whole or not. Reads headers, and rows of matrices that may repeat each other.

    thorough: compare all of those rows instead of a few. argument: what the caller calls `ckpt_dir`, for messages.
    Raises LlamaError where there is no checkpoint at all. Whatever else is wrong is listed in the result.
    """
    checkpoint = Checkpoint(*find_checkpoint(ckpt_dir, argument))
    format = checkpoint.format
    contents = format.read(checkpoint, thorough)
    for path in find_broken_links(checkpoint):
        checkpoint.problems.append(f"{describe_missing(path)}: download it again, or remove the link")
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


def open_checkpoint(ckpt_dir: str | os.PathLike, *, argument: str = "ckpt_dir") -> Checkpoint:
    """A thorough `survey` of a checkpoint of any format. Raises LlamaError if anything is wrong."""
    checkpoint = survey(ckpt_dir, thorough=True, argument=argument)
    for note in checkpoint.notes:
        print_note(f"({make_printable(note)})")
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
    kv_cache_gb: float | None = None  # None: room for max_batch_size rows of max_seq_len

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that a rank needs for (weights, KV cache)."""
        quantization = self.acceleration.quantization
        weights, cache = memory_needed(self.args, self.place.mp_size, self.place.dtype, bits_of(quantization))
        return weights, cache if self.kv_cache_gb is None else int(self.kv_cache_gb * 1e9)

    @property
    def cache_tokens(self) -> int:
        """How many tokens the KV cache holds at most."""
        full = self.args.max_batch_size * self.args.max_seq_len
        _, cache = memory_needed(self.args, self.place.mp_size, self.place.dtype)
        return full if self.kv_cache_gb is None else int(self.kv_cache_gb * 1e9 * full // cache)

    def load(self) -> Transformer:
        accelerator = Accelerator(self.acceleration)
        model = load_model(self.checkpoint, self.args, self.place, accelerator.pack_weight)
        accelerator.finish(model)
        return model


def fetch_checkpoint(ckpt_dir: PathOrNone) -> PathOrNone | Path:
    """A checkpoint's or adapter's directory on this machine, to which a URL is copied first. Called on all ranks."""
    if not is_url(ckpt_dir):
        return ckpt_dir
    check_url(str(ckpt_dir))
    with parallel.raise_together(new_long_timeout_group()):
        if parallel.is_machine_leader():
            copy_to_cache(str(ckpt_dir))
    return cache_directory(str(ckpt_dir))


def prepare_model(
    checkpoint: Checkpoint,
    place: Place,
    acceleration: Acceleration,
    max_seq_len: int,
    max_batch_size: int,
    use_file_dtype: bool,
) -> PreparedModel:
    """A checkpoint, which is open, to generate with.

    use_file_dtype: compute in the dtype of the files instead of the place's.
    Raises LlamaError for a checkpoint that can't be loaded on these ranks.
    """
    check_generates(checkpoint)
    args, place = resolve_sizes(checkpoint, place, max_seq_len, max_batch_size, use_file_dtype)
    quantization = choose_quantization(checkpoint.directory, checkpoint.quantization, acceleration.quantization)
    return PreparedModel(checkpoint, args, place, replace(acceleration, quantization=quantization))


def check_prepared(main: PreparedModel, drafts: Sequence[PreparedModel], tokenizer: AnyTokenizer) -> None:
    """Check that a model fits its tokenizer, its drafts and, with them, the memory. Raises LlamaError if not."""
    check_vocabulary(main.args, tokenizer)
    for draft in drafts:
        check_draft(draft.checkpoint.directory, draft.args.vocab_size, main.args.vocab_size)
    draft_memory = sum(sum(draft.memory) for draft in drafts)
    if main.kv_cache_gb is not None and not (is_number(main.kv_cache_gb) and main.cache_tokens > 0):
        raise LlamaError(f"kv_cache_gb is {shorten(main.kv_cache_gb)}, expected a number of GB that holds a token")
    cache = None if main.kv_cache_gb is None else main.memory[1]
    check_memory(main.args, main.place, bits_of(main.acceleration.quantization), draft_memory, cache)


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


class NoOutput(nn.Module):
    """What stands for the output layer of a model that has none. It is tied, so as to take no memory."""

    nbytes = 0  # that a decode step reads of it

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def forward(self, h: Tensor) -> Tensor:
        raise LlamaError(
            f"{self.directory} has no output layer, so it can neither generate nor score: it was saved to embed texts "
            "(Llama.embed). Take a checkpoint that has lm_head.weight"
        )


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
        if not checkpoint.has_output and checkpoint.head is None:
            model.output = NoOutput(checkpoint.directory)
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
