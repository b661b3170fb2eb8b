"""Any readable checkpoint -> a directory in the layout that is asked for: one tensor in memory at a time, those of a
file on disk, and the directory whole or not at all.

Knows the layouts by their own files; knows no ranks, no network.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .._util.console import progress_bar
from .._util.files import make_unfinished_directory, read_json, write_json
from ..accelerate.quantization import BITS, Quantization, bits_of
from ..errors import LlamaError, one_line
from ..model import ModelArgs
from ..tokenization.export import write_tokenizer_json
from ..tokenizer import Tokenizer
from . import hf_config
from . import huggingface as hf_format
from . import meta as meta_format
from .compressed_tensors import check_groups, quantization_config, rounded_tensors
from .download import is_url
from .loader import (
    CONFIG,
    Checkpoint,
    Format,
    find_settings,
    find_tokenizer,
    is_binary,
    open_checkpoint,
)
from .schema import New, is_linear, is_rotary, mp_sizes, permute_rotary, tensor_shapes
from .task_spec import body_name

FILE_BYTES = 5 * 10**9  # of one .safetensors file at most, but for a single tensor that is larger
TENSOR_FILES = ("consolidated.*.pth", "model.safetensors", "model-*-of-*.safetensors", hf_format.INDEX)
SETTINGS = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: Format,
    mp_size: int = 1,
    dtype: torch.dtype | None = None,
    force: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """Write the checkpoint in `src` to the directory `dst`, in Meta's layout (mp_size shards) or Hugging Face's.

    dtype: None keeps each tensor's own; that of rounded matrices is the embedding's. quantization: "int8" or "int4"
    stores the matrices of layers rounded from that dtype, as `compressed` tells; only in Hugging Face's layout. The
    tokenizer's files and generation_config.json come along. The configuration, without which nothing loads, is written
    last; whatever fails before leaves nothing of it. Raises LlamaError for a checkpoint that can't be read or written
    so, and where `dst` holds files, unless `force` lets it replace them.
    """
    write(open_checkpoint(src), local(dst), to, mp_size, dtype, force, quantization)


def local(directory: str | os.PathLike) -> Path:
    if is_url(directory):
        raise LlamaError(f"{directory} is a URL: expected a directory of this machine to write to")
    return Path(directory)


def write(
    checkpoint: Checkpoint,
    target: Path,
    to: Format,
    mp_size: int = 1,
    dtype: torch.dtype | None = None,
    force: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """As `convert`, of a checkpoint that was opened; its tensors may be others than those in its directory."""
    args = checkpoint.sizes
    if to == "meta" and checkpoint.head is not None:
        raise LlamaError(f"{checkpoint.directory} has a task head, for which Meta's layout has no place: use --to hf")
    if to == "hf" and mp_size != 1:
        raise LlamaError(f"mp_size is {mp_size}, but Hugging Face's layout isn't divided over ranks: leave it out")
    if mp_size not in mp_sizes(args, checkpoint.group):
        fitting = ", ".join(map(str, mp_sizes(args, checkpoint.group)))
        raise LlamaError(f"mp_size is {mp_size}, but {checkpoint.directory} can be divided over {fitting} ranks")
    check_quantization(checkpoint, to, quantization)
    if to == "meta":
        config = meta_format.params_of(args)
    else:
        known = source_config(checkpoint), dtype or checkpoint.dtype, checkpoint.task, checkpoint.head
        config = hf_config.config_of(args, *known)
    if quantization is not None:
        config["quantization_config"] = quantization_config(quantization, args.tied_embeddings)
    check_target(checkpoint, target, force)
    with make_unfinished_directory(target) as unfinished:
        sizes = file_bytes(checkpoint, dtype, quantization)
        check_space(sum(sizes.values()), unfinished, mp_size if to == "meta" else None)
        try:
            if to == "meta":
                write_meta(checkpoint, args, unfinished, mp_size, dtype)
            else:
                body = body_name(config["model_type"], checkpoint.task)
                write_hf(checkpoint, sizes, unfinished, dtype, quantization, body)
        except (RuntimeError, SafetensorError) as e:  # torch's and safetensors' words for a disk that is full
            raise LlamaError(f"{target} can't be written ({one_line(e)})") from e
        if to == "hf":
            write_tokenizer(checkpoint, unfinished)
        elif source := source_config(checkpoint):  # what only a config.json says
            write_json(unfinished / "config.json", source)
        copy_settings(checkpoint, unfinished)
        publish(unfinished, target)
        write_json(target / CONFIG[to], config)


def source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config.json` of the same model, where there is one: it holds settings that no layout of Meta's has."""
    paths = find_settings(checkpoint, "config.json")
    found = read_json(paths[0], "a model's configuration") if paths else {}
    quantization = found.pop("quantization_config", None)
    own = checkpoint.format == "hf" or not quantization  # else it is of another model than what lies in Meta's layout
    return found if own and isinstance(found.get("model_type"), str) else {}


def check_quantization(checkpoint: Checkpoint, to: Format, quantization: Quantization | None) -> None:
    if quantization is None:
        return
    if quantization not in BITS:
        raise LlamaError(f"quantization is {quantization!r}, expected None or one of {', '.join(BITS)}")
    if to == "meta":
        raise LlamaError("Meta's layout has no place for rounded matrices: use --to hf, or leave out --quantization")
    if checkpoint.head is not None:
        raise LlamaError(f"{checkpoint.directory} has a task head, which isn't rounded: leave out --quantization")
    if checkpoint.quantization is not None:
        raise LlamaError(
            f"{checkpoint.directory} holds matrices rounded to {checkpoint.quantization} already: take the checkpoint "
            "that it was made of, or leave out --quantization to write the numbers that they stand for"
        )
    check_groups(checkpoint.sizes, quantization)


def check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    source, resolved = checkpoint.directory.resolve(), target.resolve()
    if source == resolved or source in resolved.parents or resolved in source.parents:
        raise LlamaError(f"{target} and the source {checkpoint.directory} lie in each other: choose another directory")
    if (target.exists() or target.is_symlink()) and not target.is_dir():
        raise LlamaError(f"{target} is a file or a broken link: expected a directory, or nothing, there")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise LlamaError(f"{target} isn't empty: choose another directory, or replace its checkpoint with --force")


def file_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None, quantization: Quantization | None) -> dict[str, int]:
    """What each tensor of the model takes in files, in the order in which they are written."""
    sizes = {}
    for name, shape in tensor_shapes(checkpoint.sizes).items():
        bits = bits_of(quantization) if is_linear(name) else None
        sizes[name] = int(torch.Size(shape).numel() * (bits or 8 * (dtype or checkpoint.dtype_of(name)).itemsize) / 8)
    return sizes


def check_space(size: int, target: Path, shards: int | None) -> None:
    """Refuse what the disk can't hold: all that is written, and the tensors of one file again until it is."""
    needed = size + (min(size, FILE_BYTES) if shards is None else size // shards)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise LlamaError(f"{target.parent}: {needed / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free there")


def write_meta(
    checkpoint: Checkpoint, args: ModelArgs, directory: Path, mp_size: int, dtype: torch.dtype | None
) -> None:
    names, new = list(tensor_shapes(args)), partial(on_disk, directory)
    with progress_bar("writing", mp_size * len(names), " tensors") as bar:
        for rank in range(mp_size):
            tensors = {}
            for name in names:
                tensors[name] = packed(checkpoint.part(name, rank, mp_size, new), dtype, new)
                bar.update()
            if args.tied_embeddings:  # in both places, as Meta has it; stored once
                tensors["output.weight"] = tensors["tok_embeddings.weight"]
            torch.save(tensors, directory / f"consolidated.{rank:02d}.pth")


def write_hf(
    checkpoint: Checkpoint,
    sizes: dict[str, int],
    directory: Path,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
    body: str,
) -> None:
    files, new = list(hf_files(sizes)), partial(on_disk, directory)
    places: dict[str, str] = {}
    total = 0
    with progress_bar("writing", len(sizes), " tensors") as bar:
        for number, names in enumerate(files, start=1):
            single = len(files) == 1
            file = hf_format.SINGLE if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                whole = checkpoint.part(name, new=new)
                if is_rotary(name):
                    whole = permute_rotary(whole, checkpoint.sizes.head_size, "hf", new)
                if quantization is not None and is_linear(name):
                    named = rounded_tensors(whole, name, quantization, dtype or whole.dtype, new)
                else:
                    named = {name: packed(whole, dtype, new)}
                tensors |= {hf_format.hf_name(name, body): tensor for name, tensor in named.items()}
                bar.update()
            if number == len(files):
                tensors |= {name: packed(tensor, dtype, new) for name, tensor in checkpoint.head_tensors.items()}
            save_file(tensors, directory / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        write_json(directory / hf_format.INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def hf_files(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Which tensors go into each file; what they take is in `sizes`."""
    names: list[str] = []
    size = 0
    for name, more in sizes.items():
        if names and size + more > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def on_disk(directory: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor in a file without a name: what is converted shall not be in memory."""
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(dir=directory) as f:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a signal at the first write
            os.posix_fallocate(f.fileno(), 0, max(size * dtype.itemsize, 1))
        else:
            f.truncate(size * dtype.itemsize)
        return torch.from_file(f.name, shared=True, size=size, dtype=dtype).view(*shape)


def packed(tensor: Tensor, dtype: torch.dtype | None, new: New) -> Tensor:
    """`tensor` as libraries that write files want it: contiguous, of this dtype, with a storage of its own."""
    if not tensor.is_contiguous() or tensor.dtype != (dtype or tensor.dtype):
        return new(tensor.shape, dtype or tensor.dtype).copy_(tensor)
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def write_tokenizer(checkpoint: Checkpoint, unfinished: Path) -> None:
    """Say Meta's tokenizer in Hugging Face's files; those that the source has are copied over them."""
    path = find_tokenizer(checkpoint)
    if path.name == "tokenizer.model" and path.is_file() and not is_binary(path):
        write_tokenizer_json(Tokenizer(path), unfinished)


def copy_settings(checkpoint: Checkpoint, unfinished: Path) -> None:
    """Bring along the tokenizer's files and the settings of generation."""
    for name in SETTINGS:
        for found in find_settings(checkpoint, name)[:1]:
            shutil.copyfile(found, unfinished / name)


def publish(unfinished: Path, target: Path) -> None:
    """Move what was written into `target`, in the place of any checkpoint there, whose configuration goes first."""
    for name in CONFIG.values():
        (target / name).unlink(missing_ok=True)
    for pattern in (*TENSOR_FILES, *SETTINGS):
        for old in target.glob(pattern):
            old.unlink()
    for new in unfinished.iterdir():
        new.chmod(0o644)
        os.replace(new, target / new.name)
    unfinished.rmdir()
