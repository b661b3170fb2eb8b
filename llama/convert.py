"""Any readable checkpoint -> a directory in the layout that is asked for: a tensor at a time, whole or not at all.

Knows the layouts by their own files; knows no ranks, no network.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import hf_config, hf_format, meta_format
from .checkpoint import (
    CONFIG,
    Checkpoint,
    Format,
    find_tokenizer,
    is_sentencepiece,
    open_checkpoint,
    settings_places,
)
from .errors import LlamaError
from .files import read_json, write_json
from .layout import Stored, is_rotary, mp_sizes, permute_rotary, tensor_shapes
from .model import ModelArgs
from .tokenizer import Tokenizer
from .tokenizer_json import write_tokenizer_json

FILE_BYTES = 5 * 10**9  # of one .safetensors file at most, but for a single tensor that is larger
PARTIAL = ".partial-"
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
) -> None:
    """Write the checkpoint in `src` to the directory `dst`, in Meta's layout (mp_size shards) or Hugging Face's.

    dtype: None keeps each tensor's own. The tokenizer's files and generation_config.json come along. The configuration,
    without which nothing loads, is written last; whatever fails before leaves nothing of it. Raises LlamaError for a
    checkpoint that can't be read or written so, and where `dst` holds files, unless `force` lets it replace them.
    """
    checkpoint, target = open_checkpoint(src), Path(dst)
    args = checkpoint.sizes
    if to == "hf" and mp_size != 1:
        raise LlamaError(f"mp_size is {mp_size}, but Hugging Face's layout isn't divided over ranks: leave it out")
    if mp_size not in mp_sizes(args):
        fitting = ", ".join(map(str, mp_sizes(args)))
        raise LlamaError(f"mp_size is {mp_size}, but {checkpoint.directory} can be divided over {fitting} ranks")
    if to == "meta":
        config = meta_format.params_of(args)
    else:
        config = hf_config.config_of(args, source_config(checkpoint), dtype or checkpoint.dtype)
    check_target(checkpoint, target, force)
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    check_space(checkpoint, target, dtype)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target))
    try:
        write = write_meta if to == "meta" else write_hf
        write(checkpoint, args, partial, mp_size, dtype)
        if to == "hf":
            write_tokenizer(checkpoint, partial)
        copy_settings(checkpoint, partial, [*SETTINGS, *(["config.json"] if to == "meta" else [])])
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if new:
            target.rmdir()
        raise
    write_json(target / CONFIG[to], config)


def source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config.json` of the same model, where there is one: it holds settings that no layout of Meta's has."""
    path = next((d / "config.json" for d in settings_places(checkpoint) if (d / "config.json").is_file()), None)
    return {} if path is None else read_json(path, "a model's configuration")


def check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    source, resolved = checkpoint.directory.resolve(), target.resolve()
    if source == resolved or source in resolved.parents or resolved in source.parents:
        raise LlamaError(f"{target} and the source {checkpoint.directory} lie in each other: choose another directory")
    if target.exists() and not target.is_dir():
        raise LlamaError(f"{target} is a file: expected a directory, or nothing, there")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise LlamaError(f"{target} isn't empty: choose another directory, or replace its checkpoint with --force")


def check_space(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None) -> None:
    """Refuse what the disk can't hold."""
    stored = checkpoint.tensors.values()
    needed = sum(torch.Size(s.shape).numel() * (dtype or s.dtype).itemsize for s in stored)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise LlamaError(f"{target}: {needed / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free there")


def write_meta(checkpoint: Checkpoint, args: ModelArgs, partial: Path, mp_size: int, dtype: torch.dtype | None) -> None:
    names = list(tensor_shapes(args))
    with tqdm(desc="writing", total=mp_size * len(names), unit=" tensors", disable=None) as bar:
        for rank in range(mp_size):
            tensors = {}
            for name in names:
                stored = checkpoint.tensors[name]
                tensors[name] = on_disk(stored.part(args, rank, mp_size, name), stored, dtype, partial)
                bar.update()
            if args.tied_embeddings:  # in both places, as Meta has it; stored once
                tensors["output.weight"] = tensors["tok_embeddings.weight"]
            torch.save(tensors, partial / f"consolidated.{rank:02d}.pth")


def write_hf(checkpoint: Checkpoint, args: ModelArgs, partial: Path, mp_size: int, dtype: torch.dtype | None) -> None:
    files = list(hf_files(checkpoint, args, dtype))
    places: dict[str, str] = {}
    total = 0
    with tqdm(desc="writing", total=len(tensor_shapes(args)), unit=" tensors", disable=None) as bar:
        for number, names in enumerate(files, start=1):
            single = len(files) == 1
            file = hf_format.SINGLE if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {}
            for name in names:
                stored = checkpoint.tensors[name]
                whole = permute_rotary(stored.read(), args.head_size, "hf") if is_rotary(name) else stored.read()
                tensors[hf_format.hf_name(name)] = on_disk(whole, stored, dtype, partial)
                bar.update()
            save_file(tensors, partial / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        write_json(partial / hf_format.INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def hf_files(checkpoint: Checkpoint, args: ModelArgs, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """Which tensors go into each file."""
    names: list[str] = []
    size = 0
    for name, shape in tensor_shapes(args).items():
        more = torch.Size(shape).numel() * (dtype or checkpoint.tensors[name].dtype).itemsize
        if names and size + more > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def on_disk(tensor: Tensor, stored: Stored, dtype: torch.dtype | None, directory: Path) -> Tensor:
    """`tensor` as a library that writes files wants it, contiguous and with a storage of its own, but not in memory.

    What is a view of `stored` is taken from the source's file; anything else from a copy in a file without a name.
    """
    start, dtype = tensor.storage_offset() * tensor.itemsize, dtype or tensor.dtype
    mapped = {piece.untyped_storage().data_ptr() for piece in stored.pieces}
    if tensor.is_contiguous() and tensor.dtype == dtype and tensor.untyped_storage().data_ptr() in mapped:
        storage = tensor.untyped_storage()[start : start + tensor.nbytes]
        return torch.empty(0, dtype=dtype).set_(storage, 0, tensor.shape, tensor.stride())
    with tempfile.NamedTemporaryFile(dir=directory) as f:
        f.truncate(tensor.numel() * dtype.itemsize)
        copy = torch.from_file(f.name, shared=True, size=tensor.numel(), dtype=dtype)
    return copy.view(tensor.shape).copy_(tensor)


def write_tokenizer(checkpoint: Checkpoint, partial: Path) -> None:
    """Say Meta's tokenizer in Hugging Face's files; those that the source has are copied over them."""
    path = find_tokenizer(checkpoint)
    if path.name == "tokenizer.model" and path.is_file() and not is_sentencepiece(path):
        write_tokenizer_json(Tokenizer(path), partial)


def copy_settings(checkpoint: Checkpoint, partial: Path, names: list[str]) -> None:
    """Bring along the tokenizer's files and the settings of generation; and what only a config.json says."""
    for name in names:
        found = next((d / name for d in settings_places(checkpoint) if (d / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, partial / name)


def publish(partial: Path, target: Path) -> None:
    """Move what was written into `target`, in the place of any checkpoint there, whose configuration goes first."""
    for name in CONFIG.values():
        (target / name).unlink(missing_ok=True)
    for pattern in (*TENSOR_FILES, *SETTINGS):
        for old in target.glob(pattern):
            old.unlink()
    for new in partial.iterdir():
        new.chmod(0o644)
        os.replace(new, target / new.name)
    partial.rmdir()
