"""The files with tensors in a directory of Hugging Face's format: which they are, and what is in one.

Knows names and headers; knows no model.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._util.files import LONGEST_NAME, check_file, describe_content, is_plain_name, read_json, unreadable_error
from ..errors import LlamaError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")  # stem, number from 1, how many there are


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files with tensors, the name of the file of each tensor by the index: {} where none is used).

    As in transformers, a SINGLE is read instead of shards. Raises LlamaError for an index that can't be used, and where
    there is none and the names don't tell which files belong together.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        return [single] if single.exists() else find_shards(directory) or [single], {}
    places = read_json(index, "a checkpoint's index").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise LlamaError(f"{index}: weight_map is not an object of file names by tensor; download it again")
    if refused := [name for name in places.values() if not is_plain_name(name)]:
        raise LlamaError(f"{index}: weight_map names {refused[0][:LONGEST_NAME]!r}, expected names of files beside it")
    if single.exists() and SINGLE not in places.values():
        return [single], {}
    return [directory / name for name in sorted(set(places.values()))], places


def find_shards(directory: Path) -> list[Path]:
    """All shards of the one set that the directory has, as their names count them; [] where there is none.

    Raises LlamaError where a shard is missing, or where there are several sets.
    """
    sets: dict[tuple[str, str], set[int]] = {}
    for path in directory.glob("*.safetensors"):
        if match := SHARD.fullmatch(path.name):
            stem, number, count = match.groups()
            sets.setdefault((stem, count), set()).add(int(number))
    if not sets:
        return []
    usual = [key for key in sets if key[0] == "model"]
    if len(usual or sets) > 1:
        stems = ", ".join(f"{stem}-*-of-{count}.safetensors" for stem, count in sorted(sets))
        raise LlamaError(f"{directory} has {stems}, and no {INDEX} that says which of them are the model: download it")
    stem, count = (usual or [*sets])[0]
    here = sets[stem, count]
    names = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    absent = [name for number, name in enumerate(names, start=1) if number not in here]
    if absent or len(here) != len(names):
        first = absent[0] if absent else f"{stem}-{max(here):05d}-of-{count}.safetensors"
        raise LlamaError(
            f"{directory / first} is {'missing' if absent else 'one too many'}: {len(here)} of {len(names)} shards are "
            f"here, and no {INDEX}: download the rest"
        )
    return [directory / name for name in names]


def read_file(path: Path) -> dict[str, Tensor]:
    """Map one `.safetensors` file: its tensors by name, which are read from disk when they are used."""
    check_file(path)
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.offset_keys()}
    except OSError as e:
        raise unreadable_error(path, e) from e
    except SafetensorError as e:
        reason = describe_content(path)
        if "not the data" not in reason and "empty" not in reason:
            reason = f"{path.stat().st_size} bytes, {e}"
        raise LlamaError(f"{path} is truncated, damaged or no safetensors file ({reason}): download it again") from None
