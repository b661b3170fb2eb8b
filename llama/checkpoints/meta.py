"""Meta's layout on disk: `params.json` and `consolidated.NN.pth`, one for each of N ranks.

Knows no other layout. Nothing in a file is executed.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._util.files import describe_content, read_json, unreadable, write_json, write_whole
from ..errors import LlamaError
from ..model import ModelArgs
from ..rotary import LARGEST, RopeScaling
from .schema import Stored, parts, repeats, split_dim, tensor_shapes

SCALING_KEYS = ("use_scaled_rope", "rope_scaling_factor", "rope_scaling")
# Fields of ModelArgs that no params.json holds: a run sets the first two, the tensors tell the third.
NOT_IN_PARAMS = {"max_batch_size", "max_seq_len", "tied_embeddings"}
REQUIRED = ("dim", "n_layers", "n_heads")
THETA_UNSAID = {32000: 10000.0, 128256: 500000.0}  # by vocabulary: what the code of Llama 1 and 2, and of 3, took
END_OF_ZIP, END_OF_ZIP_SIZE = b"PK\x05\x06", 22
IGNORED = {"rope.freqs"}  # a table that Meta's older files carry and every reader computes itself


def shard_paths(directory: Path) -> list[Path]:
    """`consolidated.NN.pth` in the order of their ranks."""
    return sorted(directory.glob("consolidated.*.pth"))


def check_shards(directory: Path, shards: list[Path]) -> None:
    """Raise LlamaError when one between them is missing."""
    for rank, shard in enumerate(shards):
        if shard.name != f"consolidated.{rank:02d}.pth":
            raise LlamaError(
                f"{directory}: consolidated.{rank:02d}.pth is missing beside {len(shards)} other shards "
                f"(found {', '.join(s.name for s in shards[:12])}): download it again"
            )


def read_params(path: Path) -> dict[str, Any]:
    """The fields of ModelArgs that `params.json` sets, checked by name and type."""
    if not path.is_file():
        raise LlamaError(f"{path} is missing: it comes with the checkpoint, put it beside consolidated.00.pth")
    params = read_json(path, "model sizes")
    scaling = rope_scaling(path, params)
    known = {f.name: f for f in fields(ModelArgs) if f.name not in NOT_IN_PARAMS | {"rope_scaling"}}
    if unknown := sorted(params.keys() - known.keys()):
        raise LlamaError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join([*known, *SCALING_KEYS])}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise LlamaError(f"{path}: missing key {', '.join(missing)}; expected at least {', '.join(REQUIRED)}")
    for key, value in params.items():
        if not (value is None and known[key].default is None) and (wanted := misfit(key, value)):
            raise LlamaError(f"{path}: {key} is {value!r}, expected {wanted}")
    if params.get("sliding_layers") is not None:
        params["sliding_layers"] = tuple(params["sliding_layers"])
    return {**params, "rope_scaling": scaling}


def misfit(key: str, value: Any) -> str | None:
    """What a value of this field should be, if it isn't."""
    kind = ModelArgs.__annotations__[key]
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if key == "sliding_layers":
        whole = isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)
        return None if whole else "a list of layers, counted from 0"
    kinds = (int, float) if kind in (float, float | None) else int
    number = isinstance(value, kinds) and not isinstance(value, bool)
    return None if number and (0 < value < LARGEST or (key == "vocab_size" and value == -1)) else "a positive number"


def rope_scaling(path: Path, params: dict[str, Any]) -> RopeScaling | None:
    """Take the keys of rotary scaling out of `params`: Meta's own two, or all fields of a RopeScaling in one.

    Meta's flag says neither the factor nor the lengths: it is 8 for Llama 3.1 and 3.3, and 32 for the sizes of Llama
    3.2 (dim 2048 and 3072), where no `rope_scaling_factor` says otherwise.
    """
    scaled, factor, whole = (params.pop(key, None) for key in SCALING_KEYS)
    if scaled is not None and not isinstance(scaled, bool):
        raise LlamaError(f"{path}: use_scaled_rope is {scaled!r}, expected true or false")
    try:
        if whole is not None:
            if not isinstance(whole, dict) or (unknown := whole.keys() - asdict(RopeScaling("linear", 1)).keys()):
                raise LlamaError(f"rope_scaling is {whole!r}" + f", which has {unknown}" * isinstance(whole, dict))
            return RopeScaling(**whole)
        if scaled:
            return RopeScaling("llama3", scaled_rope_factor(params.get("dim")) if factor is None else factor)
    except (LlamaError, TypeError) as e:
        raise LlamaError(f"{path}: {e}") from None
    return None


def scaled_rope_factor(dim: object) -> int:
    """What `use_scaled_rope` means where no factor is given."""
    return 32 if dim in (2048, 3072) else 8


def read_shard(path: Path) -> dict[str, Tensor]:
    """Map one `consolidated.NN.pth`: names to tensors that are read from disk when they are used.

    Raises LlamaError for whatever isn't a whole file of plain tensors; code in the pickle is refused, not run.
    """
    try:
        with path.open("rb") as f:
            is_zip = f.read(4) == b"PK\x03\x04"
    except OSError as e:
        raise unreadable(path, e) from e
    if not is_zip:
        raise LlamaError(f"{path}: expected a file written by torch.save; {describe_content(path)}")
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise LlamaError(
            f"{path}: its pickle holds more than tensors, which could run code on loading; refused. "
            "Expected a file of tensors only, from a source that you trust"
        ) from None
    except Exception as e:
        if isinstance(e, RuntimeError) and "mmap" in str(e):
            raise  # the file may be whole; it is the system that won't
        size = path.stat().st_size
        raise LlamaError(f"{path} is truncated or damaged ({size} bytes, no whole archive): download it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise LlamaError(f"{path}: expected a dictionary of tensors, found a {type(tensors).__name__} of other things")
    if odd := [n for n, t in tensors.items() if t.layout != torch.strided or t.device.type != "cpu"]:
        raise LlamaError(f"{path}: {odd[0]} is sparse or has no data, expected tensors with all their numbers")
    check_end(path)
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in IGNORED}


def check_end(path: Path) -> None:
    """Raise LlamaError when something follows the archive, which torch.load reads over if it isn't much."""
    with path.open("rb") as f:
        f.seek(-min(path.stat().st_size, END_OF_ZIP_SIZE + 0x10000), os.SEEK_END)
        _, found, end = f.read().rpartition(END_OF_ZIP)
    if surplus := len(found + end) - END_OF_ZIP_SIZE:
        raise LlamaError(f"{path} is {surplus} bytes longer than the archive that it holds: download it again")


def complete_args(path: Path, params: dict[str, Any], shards: list[dict[str, Tensor]], thorough: bool) -> ModelArgs:
    """ModelArgs with what `params.json` leaves to the tensors, or to its times. Raises LlamaError if none can tell."""
    output, embedding = "output.weight", "tok_embeddings.weight"
    rows = shards[0].get(output, shards[0].get(embedding))
    params.setdefault("vocab_size", -1)
    if params["vocab_size"] == -1 and rows is not None and rows.ndim == 2:
        params = {**params, "vocab_size": rows.shape[0] * len(shards)}
    if "rope_theta" not in params:
        if params["vocab_size"] not in THETA_UNSAID:
            known = "10000 in models that come of Llama 1 and 2, 500000 in those of Llama 3"
            raise LlamaError(f"{path}: missing key rope_theta; expected {known}")
        params = {**params, "rope_theta": THETA_UNSAID[params["vocab_size"]]}
    tied = not any(output in shard for shard in shards)
    if all(output in shard and embedding in shard for shard in shards):  # Llama 3.2's files repeat the matrix
        tied = all(repeats(shard[output], shard[embedding], thorough) for shard in shards)
    return ModelArgs(**params, tied_embeddings=tied)


def gather(shards: list[dict[str, Tensor]], args: ModelArgs) -> tuple[dict[str, Stored], list[str]]:
    """Put whole tensors together from the shards of all ranks: (tensors by name, what is surplus or doesn't fit)."""
    shapes = tensor_shapes(args)
    tensors: dict[str, Stored] = {}
    problems = []
    for name, shape in shapes.items():
        pieces = [shard[name] for shard in shards if name in shard]
        if 0 < len(pieces) < len(shards):
            problems.append(f"{name} is missing in {len(shards) - len(pieces)} of {len(shards)} shards")
        elif len({(piece.shape, piece.dtype) for piece in pieces}) > 1:
            problems.append(f"{name} has other shapes or dtypes in other shards")
        if pieces:
            tensors[name] = join(name, pieces, shape, args)
    known = shapes.keys() | ({"output.weight"} if args.tied_embeddings else set())
    problems += [f"surplus {name}" for name in dict.fromkeys(n for s in shards for n in s) if name not in known]
    return tensors, problems


def ranks_by_shape(shard: Mapping[str, Tensor], args: ModelArgs) -> int:
    """In how many shards the model was split, by the rows of the first layer's queries in one of them."""
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
    repeated = len(pieces) // parts(name, args, len(pieces))  # heads that neighbouring ranks share
    return Stored(name, tuple(pieces[::repeated]), dim)


def params_of(args: ModelArgs) -> dict[str, Any]:
    """`params.json` for these sizes: Meta's keys, and of ours only those that say something."""
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
    """Write a whole model as one shard. `params.json`, without which nothing loads, comes last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "consolidated.00.pth", lambda f: torch.save(dict(tensors), f))
    write_json(directory / "params.json", params_of(args))
