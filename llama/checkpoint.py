"""A directory on disk -> (ModelArgs, this rank's tensors). Here formats and shard counts are met; past here there is
one layout, Meta's names and interleaved rotary pairs.

Knows no tokenizer and no generation. Files come from strangers: nothing in them is executed.
"""

import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import LlamaError
from .model import ModelArgs, Transformer
from .parallel import Place, together
from .rotary import RopeScaling

ROPE_KEYS = ("use_scaled_rope", "rope_scaling_factor", "rope_scaling")
RUN_SIZES = {"max_batch_size", "max_seq_len"}  # fields of ModelArgs that a run sets and no checkpoint holds
REQUIRED = ("dim", "n_layers", "n_heads", "vocab_size")
IGNORED = {"rope.freqs"}  # a table that Meta's older files carry and every reader computes itself

# The dimension along which fairscale divides each matrix over ranks. What isn't here is whole on every rank.
SPLIT_DIM = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


@dataclass(frozen=True)
class Checkpoint:
    """What a directory was found to hold: its parameters as read, and its shards in the order of their ranks."""

    directory: Path
    params: dict[str, Any]
    shards: tuple[Path, ...]


def open_checkpoint(ckpt_dir: str | os.PathLike) -> Checkpoint:
    """Look at `params.json` and `consolidated.NN.pth`; reads no tensor.

    Raises LlamaError: no such directory, no checkpoint in it, `params.json` that can't be used, a shard missing.
    """
    if not isinstance(ckpt_dir, (str, os.PathLike)) or ckpt_dir == "":
        raise LlamaError(f"ckpt_dir is {ckpt_dir!r}, expected the path of a checkpoint's directory")
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise LlamaError(f"ckpt_dir {directory}: found {found} there, expected a directory that holds a checkpoint")
    shards = sorted(directory.glob("consolidated.*.pth"))
    if not shards:
        names = sorted(p.name for p in directory.iterdir())
        there = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise LlamaError(
            f"ckpt_dir {directory}: expected params.json and consolidated.00.pth, found {there or 'an empty directory'}"
        )
    for rank, shard in enumerate(shards):
        if shard.name != f"consolidated.{rank:02d}.pth":
            raise LlamaError(
                f"{directory}: consolidated.{rank:02d}.pth is missing beside {len(shards)} other shards "
                f"(found {', '.join(s.name for s in shards[:12])}): download it again"
            )
    return Checkpoint(directory, read_params(directory / "params.json"), tuple(shards))


def read_params(path: Path) -> dict[str, Any]:
    """The fields of ModelArgs that `params.json` sets, checked by name and type."""
    if not path.is_file():
        raise LlamaError(f"{path} is missing: it comes with the checkpoint, put it beside consolidated.00.pth")
    try:
        params = json.loads(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from e
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
        raise LlamaError(f"{path} is not JSON ({e}): {describe_content(path)}; download it again") from None
    if not isinstance(params, dict):
        raise LlamaError(f"{path}: expected a JSON object of model sizes, found a {type(params).__name__}")
    scaling = rope_scaling(path, params)
    known = {f.name: f.default for f in fields(ModelArgs) if f.name not in RUN_SIZES | {"rope_scaling"}}
    if unknown := sorted(params.keys() - known.keys()):
        raise LlamaError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join([*known, *ROPE_KEYS])}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise LlamaError(f"{path}: missing key {', '.join(missing)}; expected at least {', '.join(REQUIRED)}")
    for key, value in params.items():
        optional = known[key] is None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = number and (isinstance(value, int) or key in ("norm_eps", "rope_theta", "ffn_dim_multiplier"))
        positive = number and (value > 0 or (key == "vocab_size" and value == -1))
        if not (optional and value is None) and not (whole and positive):
            raise LlamaError(f"{path}: {key} is {value!r}, expected a positive number")
    return {**params, "rope_scaling": scaling}


def rope_scaling(path: Path, params: dict[str, Any]) -> RopeScaling | None:
    """Take the keys of rotary scaling out of `params`: Meta's own two, or all fields of a RopeScaling in one.

    Meta's flag says neither the factor nor the lengths: it is 8 for Llama 3.1 and 3.3, and 32 for the sizes of Llama
    3.2 (dim 2048 and 3072), where no `rope_scaling_factor` says otherwise.
    """
    scaled, factor, whole = (params.pop(key, None) for key in ROPE_KEYS)
    if scaled not in (None, True, False):
        raise LlamaError(f"{path}: use_scaled_rope is {scaled!r}, expected true or false")
    try:
        if whole is not None:
            return RopeScaling(**whole)
        if scaled:
            return RopeScaling("llama3", (32 if params.get("dim") in (2048, 3072) else 8) if factor is None else factor)
    except (LlamaError, TypeError) as e:
        raise LlamaError(f"{path}: {e}") from None
    return None


def unreadable(path: Path, e: OSError) -> LlamaError:
    return LlamaError(f"{path} can't be read ({e.strerror}): expected a file that you may read")


def describe_content(path: Path) -> str:
    """What a file that isn't what its name says seems to be, for an error message."""
    with path.open("rb") as f:
        head = f.read(256).lstrip()
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return f"it is a Git LFS pointer of {size} bytes, not the data (run: git lfs pull)"
    if head.startswith(b"<"):
        return f"it is an HTML or XML page of {size} bytes, not the data (was the download refused?)"
    return f"it has {size} bytes and starts with {head[:16]!r}"


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
        size = path.stat().st_size
        raise LlamaError(f"{path} is truncated or damaged ({size} bytes, no whole archive): download it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise LlamaError(f"{path}: expected a dictionary of tensors, found a {type(tensors).__name__} of other things")
    return {name: tensor for name, tensor in tensors.items() if name not in IGNORED}


def split_dim(name: str) -> int | None:
    """Along which dimension the tensor `name` is divided over ranks; None: every rank holds all of it."""
    return SPLIT_DIM.get(name.removesuffix(".weight").rpartition(".")[2])


def read_rank(checkpoint: Checkpoint, mp_rank: int, mp_size: int) -> dict[str, Tensor]:
    """The tensors of one model-parallel rank, mapped. As many shards as ranks, or one shard that every rank slices.

    Other counts, which `checks.check_ranks` refuses, and other formats enter here.
    """
    shards = checkpoint.shards
    if len(shards) == mp_size:
        return read_shard(shards[mp_rank])
    tensors = read_shard(shards[0])
    for name, tensor in tensors.items():
        dim = split_dim(name)
        if dim is not None and tensor.ndim == 2 and tensor.shape[dim] % mp_size == 0:
            tensors[name] = tensor.chunk(mp_size, dim)[mp_rank]
    return tensors


class _LegacyConstructorsOnMeta(TorchDispatchMode):
    """Sends `torch.Tensor(rows, columns)`, which fairscale's layers call and `torch.device` doesn't reach, to meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def build_on_meta(args: ModelArgs) -> Transformer:
    """The network of these sizes with shapes and no memory: a model to assign tensors to."""
    with torch.device("meta"), _LegacyConstructorsOnMeta():
        return Transformer(args)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise LlamaError that names what is missing, surplus or misshapen in this rank's tensors."""
    here = len(checkpoint.shards)
    wq = "layers.0.attention.wq.weight"
    if wq in found and wq in expected and found[wq].shape[1:] == expected[wq].shape[1:]:
        split = here * expected[wq].shape[0] // max(found[wq].shape[0], 1)
        if split > here:
            raise LlamaError(
                f"{checkpoint.directory}: by the shape of {wq} the checkpoint was split in {split} shards, "
                f"but {here} {'is' if here == 1 else 'are'} here: download the missing ones"
            )
    problems = [f"missing {n}" for n in expected if n not in found]
    problems += [f"surplus {n}" for n in found if n not in expected]
    problems += [
        f"{n} of shape {tuple(found[n].shape)}, expected {tuple(expected[n].shape)}"
        for n in expected
        if n in found and found[n].shape != expected[n].shape
    ]
    problems += [
        f"{n} of {t.dtype} on {t.device}"
        for n, t in found.items()
        if not t.is_floating_point() or t.device.type != "cpu"
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise LlamaError(
            f"{checkpoint.directory}: the tensors don't fit params.json: {'; '.join(problems[:5])}{more}. "
            "Are both files of the same model?"
        )


def load_model(checkpoint: Checkpoint, args: ModelArgs, place: Place) -> Transformer:
    """The Transformer of this rank with its weights. On the CPU, in the file's own dtype, they stay mapped: all that
    are whole or cut along their rows.

    If one rank fails, every rank raises its LlamaError.
    """
    with together():
        model = build_on_meta(args)
        tensors = read_rank(checkpoint, place.mp_rank, place.mp_size)
        check_tensors(tensors, model.state_dict(), checkpoint)
        for name in tensors:  # replaced one by one: at most one tensor is held twice
            tensors[name] = tensors[name].to(place.device, place.dtype).contiguous()
        model.load_state_dict(tensors, strict=True, assign=True)
    return model


def memory_needed(args: ModelArgs, mp_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one model-parallel rank takes for (weights, KV cache)."""
    attention = 2 * args.dim * args.dim + 2 * args.dim * args.kv_heads * args.head_dim
    matrices = args.n_layers * (attention + 3 * args.dim * args.hidden_dim) + 2 * args.vocab_size * args.dim
    norms = (2 * args.n_layers + 1) * args.dim
    cache = 2 * args.n_layers * args.max_batch_size * args.max_seq_len * args.kv_heads * args.head_dim
    return (matrices // mp_size + norms) * dtype.itemsize, cache // mp_size * dtype.itemsize


def write_whole(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary file beside `path` and rename it there: the file is whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as f:
        try:
            write(f)
            f.close()
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            f.close()
            os.unlink(f.name)
            raise


def save_checkpoint(directory: str | os.PathLike, args: ModelArgs, tensors: Mapping[str, Tensor]) -> None:
    """Write a whole model in Meta's format, as one shard. `params.json`, without which nothing loads, comes last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    params = {key: value for key, value in asdict(args).items() if key not in RUN_SIZES}
    if params["rope_scaling"] is None:
        del params["rope_scaling"]
    write_whole(directory / "consolidated.00.pth", lambda f: torch.save(dict(tensors), f))
    text = json.dumps(params, indent=2) + "\n"
    write_whole(directory / "params.json", lambda f: f.write(text.encode()))
