"""Any readable checkpoint -> a directory in the requested format, which is written whole or not at all.

At most one tensor is in memory at a time, and those of one file are on disk. Knows no format, which is a record in
`formats`; knows no ranks and no network.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .._util.device import choose_dtype
from .._util.files import check_file, make_unfinished_directory, read_json, refuse_unwritable, write_json
from .._util.urls import is_url
from ..accelerate.quantization import BITS, Quantization, bits_of
from ..errors import LlamaError, shorten
from .checkpoint import Checkpoint, CheckpointFormat, Export
from .compressed_tensors import check_groups
from .formats import FORMATS
from .loader import open_checkpoint
from .schema import is_linear, mp_sizes, tensor_shapes
from .side_files import SETTINGS, TOKENIZER_SETTINGS, find_side_files, find_tokenizer_files


def convert(
    src: str | os.PathLike | Checkpoint,
    dst: str | os.PathLike,
    to: str,
    mp_size: int = 1,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """Write the checkpoint in `src` to the directory `dst`. src: its directory, or a Checkpoint that is open.

    to: the format, a name in FORMATS: "meta" (mp_size shards) or "hf".
    dtype: a name or torch's object; None keeps each tensor's own; that of quantized matrices is the embedding's.
    quantization: "int8" or "int4" stores the matrices of layers quantized, from numbers of that dtype, as
    `compressed_tensors` describes; only in the format "hf".
    force: replace the checkpoint in `dst`.

    The tokenizer's files and generation_config.json are copied too. The configuration, without which nothing loads, is
    written last, so a failure leaves no checkpoint behind. Raises LlamaError for a checkpoint that can't be read, or
    can't be written in this form, and where `dst` holds files, unless `force` is set.
    """
    chosen = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src, argument="src")
    write(checkpoint, as_local_path(dst), to, mp_size, chosen, force, quantization)


def as_local_path(directory: str | os.PathLike) -> Path:
    """The directory as a Path. Raises LlamaError for a URL."""
    if is_url(directory):
        raise LlamaError(f"{directory} is a URL: expected a directory of this machine to write to")
    return Path(directory)


def write(
    checkpoint: Checkpoint,
    target: Path,
    to: str,
    mp_size: int = 1,
    dtype: torch.dtype | None = None,
    force: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """As `convert`, of a checkpoint that is open; its tensors may differ from those in its directory."""
    format = find_format(to)
    check_format(format, checkpoint, mp_size, quantization)
    export = Export(checkpoint, mp_size, dtype, quantization, read_source_config(checkpoint))
    config = format.make_config(export)
    check_target(checkpoint, target, force)
    with refuse_unwritable(target), make_unfinished_directory(target) as unfinished:
        sizes = file_bytes(export)
        total = sum(sizes.values())
        check_space(total + format.largest_file(total, mp_size), unfinished)
        format.write(export, config, sizes, unfinished)
        copy_settings(checkpoint, unfinished)
        publish(unfinished, target)
        write_json(target / format.config, config)


def find_format(name: str) -> CheckpointFormat:
    if name not in FORMATS:
        raise LlamaError(f"the format to write is {shorten(name)}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def read_source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config.json` of the same model, or {}: it holds settings that other formats have no place for."""
    paths = find_side_files(checkpoint, "config.json")
    config = read_json(paths[0], "a model's configuration") if paths else {}
    quantization = config.pop("quantization_config", None)
    if quantization and not checkpoint.format.holds_quantized:
        return {}  # the file is of another model than the tensors
    return config if isinstance(config.get("model_type"), str) else {}


# --- checks ---------------------------------------------------------------------------------------------------------


def check_format(
    format: CheckpointFormat, checkpoint: Checkpoint, mp_size: int, quantization: Quantization | None
) -> None:
    """Raise LlamaError for what the format has no place for, and for what can't be made of this checkpoint."""
    if (checkpoint.head is not None or not checkpoint.has_output) and not format.holds_heads:
        what = "a task head" if checkpoint.has_output else "no output layer"
        raise LlamaError(
            f"{checkpoint.directory} has {what}, for which {format.label}'s layout has no place: use "
            + " or ".join(f"--to {other.name} (to={other.name!r})" for other in FORMATS.values() if other.holds_heads)
        )
    if mp_size != 1 and not format.holds_shards:
        raise LlamaError(f"mp_size is {mp_size}, but {format.label}'s layout isn't divided over ranks: leave it out")
    if mp_size not in (sizes := mp_sizes(checkpoint.sizes, checkpoint.group)):
        fitting = ", ".join(map(str, sizes))
        raise LlamaError(f"mp_size is {mp_size}, but {checkpoint.directory} can be divided over {fitting} ranks")
    if quantization is not None:
        check_quantization(format, checkpoint, quantization)


def check_quantization(format: CheckpointFormat, checkpoint: Checkpoint, quantization: Quantization) -> None:
    if quantization not in BITS:
        raise LlamaError(f"quantization is {shorten(quantization)}, expected None or one of {', '.join(BITS)}")
    if not format.holds_quantized:
        others = " or ".join(f"--to {o.name} (to={o.name!r})" for o in FORMATS.values() if o.holds_quantized)
        raise LlamaError(
            f"{format.label}'s layout has no place for quantized matrices: use {others}, or leave out quantization"
        )
    if checkpoint.head is not None:
        raise LlamaError(f"{checkpoint.directory} has a task head, which isn't quantized: leave out quantization")
    if checkpoint.quantization is not None:
        raise LlamaError(
            f"{checkpoint.directory} holds matrices quantized to {checkpoint.quantization} already: take the "
            "checkpoint that it was made of, or leave out quantization to write the numbers that they stand for"
        )
    check_groups(checkpoint.sizes, quantization)


def check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    """Raise LlamaError if `target` can't be written to, or holds files that `force` doesn't allow to be replaced."""
    resolved = target.resolve()
    for directory in filter(None, (checkpoint.directory, checkpoint.adapter)):
        source = directory.resolve()
        if source == resolved:
            raise LlamaError(f"{target} is the source itself, which isn't written over: choose another directory")
        if source in resolved.parents or resolved in source.parents:
            raise LlamaError(f"{target} and the source {directory} lie in each other: choose another directory")
    if (target.exists() or target.is_symlink()) and not target.is_dir():
        raise LlamaError(f"{target} is a file or a broken link: expected a directory, or nothing, there")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise LlamaError(
            f"{target} isn't empty: choose another directory, or replace its checkpoint with --force (force=True)"
        )


def file_bytes(export: Export) -> dict[str, int]:
    """The bytes of each of the model's tensors in files, in the order in which they are written."""
    checkpoint, sizes = export.checkpoint, {}
    for name, shape in tensor_shapes(checkpoint.sizes).items():
        bits = bits_of(export.quantization) if is_linear(name) else None
        if bits is None:
            bits = 8 * (export.dtype or checkpoint.dtype_of(name)).itemsize
        sizes[name] = int(torch.Size(shape).numel() * bits / 8)
    return sizes


def check_space(needed: int, directory: Path) -> None:
    """Raise LlamaError if the disk has no room for so many bytes: all files, and one file's tensors beside them."""
    if needed > (free := shutil.disk_usage(directory).free):
        sizes = f"{needed / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free there"
        raise LlamaError(f"{directory.parent}: {sizes}")


# --- side files, and the last step ----------------------------------------------------------------------------------


def copy_settings(checkpoint: Checkpoint, unfinished: Path) -> None:
    """Copy the tokenizer's files and the settings of generation. They replace files that `write` made from others."""
    for name in SETTINGS:
        find = find_tokenizer_files if name in TOKENIZER_SETTINGS else find_side_files
        for path in find(checkpoint, name)[:1]:
            check_file(path)
            shutil.copyfile(path, unfinished / name)


def publish(unfinished: Path, target: Path) -> None:
    """Move what was written into `target`, where any checkpoint is removed first, its configuration before the rest."""
    for format in FORMATS.values():
        (target / format.config).unlink(missing_ok=True)
    for pattern in (*(pattern for format in FORMATS.values() for pattern in format.written_patterns), *SETTINGS):
        for old in target.glob(pattern):
            old.unlink()
    for new in unfinished.iterdir():
        new.chmod(0o644)
        os.replace(new, target / new.name)
    unfinished.rmdir()
