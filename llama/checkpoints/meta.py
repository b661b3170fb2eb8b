"""Meta's format of checkpoints: `params.json`, and `consolidated.NN.pth` for each of N ranks.

Knows no other format. Nothing in a file is executed.
"""

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from .._util.console import progress_bar
from .._util.files import describe_content, open_file, read_json, unreadable_error, write_json, write_whole
from ..errors import LlamaError, shorten
from ..model import ModelArgs
from ..rotary import LARGEST, RopeScaling
from .checkpoint import Checkpoint, CheckpointFormat, Contents, Export
from .schema import Stored, are_equal, count_parts, split_dim, tensor_shapes
from .writing import allocate_on_disk, make_writable

SCALING_KEYS = ("use_scaled_rope", "rope_scaling_factor", "rope_scaling")
# Fields of ModelArgs that are in no params.json: a run chooses the first two, the tensors show the third.
NOT_IN_PARAMS = {"max_batch_size", "max_seq_len", "tied_embeddings"}
REQUIRED = ("dim", "n_layers", "n_heads")
# vocab_size -> rope_theta of a params.json that lacks it: the constant in the code of Llama 1 and 2, and of Llama 3.
DEFAULT_THETA = {32000: 10000.0, 128256: 500000.0}
END_OF_ZIP, END_OF_ZIP_SIZE = b"PK\x05\x06", 22
IGNORED = {"rope.freqs"}  # a table in Meta's older files, which is computed here


def shard_paths(directory: Path) -> list[Path]:
    """`consolidated.NN.pth` in the order of their ranks."""
    return sorted(directory.glob("consolidated.*.pth"))


def check_shards(directory: Path, shards: list[Path]) -> None:
    """Raise LlamaError if a shard is missing between others."""
    for rank, shard in enumerate(shards):
        if shard.name != f"consolidated.{rank:02d}.pth":
            raise LlamaError(
                f"{directory}: consolidated.{rank:02d}.pth is missing beside {len(shards)} other shards "
                f"(found {', '.join(s.name for s in shards[:12])}): download it again"
            )


def read_params(path: Path) -> dict[str, Any]:
    """The fields of ModelArgs that `params.json` sets, checked by name and type."""
    if not path.exists():
        raise LlamaError(f"{path} is missing: it comes with the checkpoint, put it beside consolidated.00.pth")
    params = read_json(path, "model sizes")
    scaling = pop_rope_scaling(path, params)
    defaults = {f.name: f.default for f in fields(ModelArgs) if f.name not in NOT_IN_PARAMS | {"rope_scaling"}}
    if unknown := sorted(params.keys() - defaults.keys()):
        raise LlamaError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join([*defaults, *SCALING_KEYS])}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise LlamaError(f"{path}: missing key {', '.join(missing)}; expected at least {', '.join(REQUIRED)}")
    for key, value in params.items():
        if not (value is None and defaults[key] is None) and (expected := check_param(key, value)):
            raise LlamaError(f"{path}: {key} is {shorten(value)}, expected {expected}")
    if params.get("sliding_layers") is not None:
        params["sliding_layers"] = tuple(params["sliding_layers"])
    return {**params, "rope_scaling": scaling}


def check_param(key: str, value: Any) -> str | None:
    """None if the value can be that of the field `key` of ModelArgs, else what was expected."""
    kind = ModelArgs.__annotations__[key]
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if key == "sliding_layers":
        is_layers = isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)
        return None if is_layers else "a list of layers, counted from 0"
    kinds = (int, float) if kind in (float, float | None) else int
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return None if is_number and (0 < value < LARGEST or (key == "vocab_size" and value == -1)) else "a positive number"


def pop_rope_scaling(path: Path, params: dict[str, Any]) -> RopeScaling | None:
    """Take the keys of rotary scaling out of `params`: Meta's own two, or the fields of a RopeScaling in one key.

    `use_scaled_rope` implies a factor, unless there is a `rope_scaling_factor`: see `scaled_rope_factor`.
    """
    scaled, factor, all_fields = (params.pop(key, None) for key in SCALING_KEYS)
    if scaled is not None and not isinstance(scaled, bool):
        raise LlamaError(f"{path}: use_scaled_rope is {shorten(scaled)}, expected true or false")
    try:
        if all_fields is not None:
            names = asdict(RopeScaling("linear", 1)).keys()
            if not isinstance(all_fields, dict):
                raise LlamaError(f"rope_scaling is {shorten(all_fields)}, expected a JSON object")
            if unknown := sorted(all_fields.keys() - names):
                raise LlamaError(f"rope_scaling has {shorten(unknown[0])}; known are {', '.join(names)}")
            return RopeScaling(**all_fields)
        if scaled:
            return RopeScaling("llama3", scaled_rope_factor(params.get("dim")) if factor is None else factor)
    except (LlamaError, TypeError) as e:
        raise LlamaError(f"{path}: {e}") from None
    return None


def scaled_rope_factor(dim: object) -> int:
    """The factor of `use_scaled_rope`: 32 for the sizes of Llama 3.2 (dim 2048 and 3072), 8 for Llama 3.1 and 3.3."""
    return 32 if dim in (2048, 3072) else 8


def read_shard(path: Path) -> dict[str, Tensor]:
    """Map one `consolidated.NN.pth`: its tensors by name, which are read from disk when they are used.

    Raises LlamaError for all but a whole file of plain tensors. Code in the pickle is refused, not run.
    """
    try:
        with open_file(path) as f:
            is_zip = f.read(4) == b"PK\x03\x04"
    except OSError as e:
        raise unreadable_error(path, e) from e
    if not is_zip:
        raise LlamaError(f"{path}: expected a file written by torch.save; {describe_content(path)}")
    check_members(path)
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise LlamaError(
            f"{path}: its pickle holds more than tensors, which could run code on loading; refused. "
            "Expected a file of tensors only, from a source that you trust"
        ) from None
    except Exception as e:
        if isinstance(e, RuntimeError) and "mmap" in str(e):
            raise  # the file may be whole: the system can't map it
        size = path.stat().st_size
        raise LlamaError(f"{path} is truncated or damaged ({size} bytes, no whole archive): download it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise LlamaError(f"{path}: expected a dictionary of tensors, found a {type(tensors).__name__} of other things")
    if odd := [n for n, t in tensors.items() if t.layout != torch.strided or t.device.type != "cpu"]:
        raise LlamaError(f"{path}: {odd[0]} is sparse or has no data, expected tensors with all their numbers")
    check_end(path)
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in IGNORED}


def check_members(path: Path) -> None:
    """Raise LlamaError for a compressed member of the archive: a few bytes may stand for more than all memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return  # torch.load says what is wrong
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise LlamaError(
                f"{path}: {shorten(member.filename)} is compressed, {member.compress_size} bytes that stand for "
                f"{member.file_size}; expected a file as torch.save writes it, without compression"
            )


def check_end(path: Path) -> None:
    """Raise LlamaError if bytes follow the archive; torch.load doesn't notice a few."""
    with open_file(path) as f:
        f.seek(-min(path.stat().st_size, END_OF_ZIP_SIZE + 0x10000), os.SEEK_END)
        _, signature, rest = f.read().rpartition(END_OF_ZIP)
    if surplus := len(signature + rest) - END_OF_ZIP_SIZE:
        raise LlamaError(f"{path} is {surplus} bytes longer than the archive that it holds: download it again")


def complete_args(path: Path, params: dict[str, Any], shards: list[dict[str, Tensor]], thorough: bool) -> ModelArgs:
    """ModelArgs. Fields that `params` lacks are read off the tensors, or are those of the published models.

    Raises LlamaError where the base of the rotary embedding is unknown.
    """
    output, embedding = "output.weight", "tok_embeddings.weight"
    rows = shards[0].get(output, shards[0].get(embedding))
    params.setdefault("vocab_size", -1)
    if params["vocab_size"] == -1 and rows is not None and rows.ndim == 2:
        params = {**params, "vocab_size": rows.shape[0] * len(shards)}
    if "rope_theta" not in params:
        if params["vocab_size"] not in DEFAULT_THETA:
            expected = "10000 in models that come of Llama 1 and 2, 500000 in those of Llama 3"
            raise LlamaError(f"{path}: missing key rope_theta; expected {expected}")
        params = {**params, "rope_theta": DEFAULT_THETA[params["vocab_size"]]}
    tied = not any(output in shard for shard in shards)
    if all(output in shard and embedding in shard for shard in shards):  # Llama 3.2's files repeat the matrix
        tied = all(are_equal(shard[output], shard[embedding], thorough) for shard in shards)
    return ModelArgs(**params, tied_embeddings=tied)


def read_checkpoint(checkpoint: Checkpoint, thorough: bool) -> Contents:
    """Read `params.json` and the shards. Returns the tensors of each shard, or nothing where something is wrong."""
    directory = checkpoint.directory
    params = checkpoint.attempt(read_params, checkpoint.config)
    checkpoint.files = shard_paths(directory)
    checkpoint.attempt(partial(check_shards, shards=checkpoint.files), directory)
    shards = [shard for path in checkpoint.files if (shard := checkpoint.attempt(read_shard, path)) is not None]
    if checkpoint.problems or params is None:
        return []
    complete = partial(complete_args, params=params, shards=shards, thorough=thorough)
    args = checkpoint.attempt(complete, checkpoint.config)
    if args is None:
        return []
    count = count_shards(shards[0], args)
    if count > len(shards):
        here = f"{len(shards)} {'is' if len(shards) == 1 else 'are'} here"
        checkpoint.problems.append(
            f"{directory}: by the shape of its tensors the checkpoint was split in {count} shards, but "
            f"{here}: download the missing ones"
        )
        return []
    checkpoint.args = args
    return shards


def gather(checkpoint: Checkpoint, shards: Contents, thorough: bool) -> tuple[dict[str, Stored], list[str]]:
    """Put whole tensors together from the shards of all ranks: (tensors by name, misfits)."""
    args = checkpoint.sizes
    shapes = tensor_shapes(args)
    tensors: dict[str, Stored] = {}
    misfits = []
    for name, shape in shapes.items():
        pieces = [shard[name] for shard in shards if name in shard]
        if 0 < len(pieces) < len(shards):
            misfits.append(f"{name} is missing in {len(shards) - len(pieces)} of {len(shards)} shards")
        elif len({(piece.shape, piece.dtype) for piece in pieces}) > 1:
            misfits.append(f"{name} has other shapes or dtypes in other shards")
        if pieces:
            tensors[name] = join(name, pieces, shape, args)
    names = shapes.keys() | ({"output.weight"} if args.tied_embeddings else set())
    misfits += [f"surplus {name}" for name in dict.fromkeys(n for s in shards for n in s) if name not in names]
    return tensors, misfits


def count_shards(shard: Mapping[str, Tensor], args: ModelArgs) -> int:
    """Into how many shards the model was split, by the rows of the first layer's wq in one of them."""
    wq = shard.get("layers.0.attention.wq.weight")
    if wq is None or wq.ndim != 2 or wq.shape[1] != args.dim:
        return 1
    return args.n_heads * args.head_size // max(wq.shape[0], 1)


def join(name: str, pieces: list[Tensor], shape: tuple[int, ...], args: ModelArgs) -> Stored:
    """The pieces of all shards, in the order of their ranks, as one tensor."""
    dim = split_dim(name)
    if dim is None or len(pieces) == 1 or any(piece.ndim != len(shape) for piece in pieces):
        return Stored(name, tuple(pieces[:1]))
    if name == "tok_embeddings.weight" and pieces[0].shape[0] == shape[0]:
        dim = 1  # Llama 1 and 2 divided the embedding by columns
    repeated = len(pieces) // count_parts(name, args, len(pieces))  # so many neighbouring ranks hold the same heads
    return Stored(name, tuple(pieces[::repeated]), dim)


def params_of(args: ModelArgs) -> dict[str, Any]:
    """`params.json` of these sizes: Meta's keys, and those of our own fields that aren't at their defaults."""
    defaults = asdict(ModelArgs())
    meta_keys = list(defaults)[: list(defaults).index("max_batch_size")]
    values = asdict(args)
    params = {key: values[key] for key in meta_keys if values[key] is not None}
    ours = [key for key in defaults if key not in NOT_IN_PARAMS | {*meta_keys, "rope_scaling"}]
    params |= {key: values[key] for key in ours if values[key] != defaults[key]}
    scaling = args.rope_scaling
    if scaling is not None and scaling == RopeScaling("llama3", scaling.factor):
        params["use_scaled_rope"] = True
        if scaling.factor != scaled_rope_factor(args.dim):
            params["rope_scaling_factor"] = scaling.factor
    elif scaling is not None:
        params["rope_scaling"] = asdict(scaling)
    return params


def save_checkpoint(directory: str | os.PathLike, args: ModelArgs, tensors: Mapping[str, Tensor]) -> None:
    """Write a whole model as one shard. `params.json`, without which nothing loads, is written last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "consolidated.00.pth", lambda f: torch.save(dict(tensors), f))
    write_json(directory / "params.json", params_of(args))


def write_shards(export: Export, config: Mapping[str, Any], sizes: Mapping[str, int], directory: Path) -> None:
    """Write `consolidated.NN.pth` for each rank, and the model's config.json, for what `params.json` can't say."""
    checkpoint, args = export.checkpoint, export.checkpoint.sizes
    new = partial(allocate_on_disk, directory)
    with progress_bar("writing", export.mp_size * len(sizes), " tensors") as bar:
        for rank in range(export.mp_size):
            tensors = {}
            for name in sizes:
                tensors[name] = make_writable(checkpoint.part(name, rank, export.mp_size, new), export.dtype, new)
                bar.update()
            if args.tied_embeddings:  # in both places, as Meta has it; stored once
                tensors["output.weight"] = tensors["tok_embeddings.weight"]
            with open_file(directory / f"consolidated.{rank:02d}.pth", "wb") as f:  # whose errors say what is wrong
                torch.save(tensors, cast(IO[bytes], f))
    if export.source_config:
        write_json(directory / "config.json", dict(export.source_config))


FORMAT = CheckpointFormat(
    name="meta",
    label="Meta",
    config="params.json",
    example="consolidated.00.pth",
    patterns=("consolidated.*.pth", "original/consolidated.*.pth"),
    written_patterns=("consolidated.*.pth",),
    tokenizers=("tokenizer.model", "tokenizer.json"),
    holds_heads=False,
    holds_quantized=False,
    holds_shards=True,
    read=read_checkpoint,
    gather=gather,
    spell=lambda checkpoint, name: name,
    make_config=lambda export: params_of(export.checkpoint.sizes),
    write=write_shards,
    largest_file=lambda size, mp_size: size // mp_size,
)
