"""What to do about a ckpt_dir at which there is no checkpoint: the next step that its error message names.

Knows what people give instead of a checkpoint's directory; looks for a checkpoint near it; reads no file's content.
"""

import os
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from .._util.urls import HUB_NAME, say_download
from .demo import find_demo

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".7z", ".rar")
LOOKED_AT = 200  # folders at most, below a directory without a checkpoint
DEPTH = 3  # of the folders that are looked at
ABOVE = 2  # how many folders above are looked at

HoldsCheckpoint = Callable[[Path], bool]


def next_step(path: Path, holds_checkpoint: HoldsCheckpoint) -> str:
    """What to do about `path`, which holds no checkpoint: "; " and a sentence; "" if nothing is known."""
    step = _step_for_file(path, holds_checkpoint) if path.is_file() else _step_for_folder(path, holds_checkpoint)
    return step and f"; {step}"


def _step_for_folder(path: Path, holds_checkpoint: HoldsCheckpoint) -> str:
    if path == Path("demo/model") and not path.exists() and (demo := find_demo()):
        return f"the demo model is in {demo}: give that"
    if re.fullmatch(HUB_NAME, str(path)) and not path.parent.exists():
        cached = _find_below(_hub_cache() / ("models--" + str(path).replace("/", "--")), holds_checkpoint)
        if cached:
            return f"the Hugging Face Hub's cache has a model of this name: give {cached[-1]}"
        return f"as a name on the Hugging Face Hub: {say_download(str(path))}"
    if below := _find_below(path, holds_checkpoint):
        more = f" (and {len(below) - 1} more)" * (len(below) > 1)
        return f"a folder in it holds a checkpoint: give {below[0]}{more}"
    if above := _find_above(path, holds_checkpoint):
        return f"a folder above it holds a checkpoint: give {above}"
    if path.is_dir() and any(path.glob("*.gguf")):
        return _STEP_FOR_GGUF
    return _suggest_sibling(path)


_STEP_FOR_GGUF = (
    "GGUF files aren't read: give the directory of the model that it was made of, with *.safetensors or *.pth"
)


def _step_for_file(path: Path, holds_checkpoint: HoldsCheckpoint) -> str:
    if holds_checkpoint(path.parent):
        return f"give the directory that the file is in: {path.parent}"
    if above := _find_above(path.parent, holds_checkpoint):
        return f"a folder above it holds a checkpoint: give {above}"
    if path.suffix.lower() == ".gguf":
        return _STEP_FOR_GGUF
    if path.name.lower().endswith(ARCHIVES):
        return "unpack the archive, and give the directory that was in it"
    return "give the directory of the checkpoint that it belongs to"


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, by the variables that it reads."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def _find_below(path: Path, holds_checkpoint: HoldsCheckpoint) -> list[Path]:
    """The folders in `path` that hold checkpoints, in order of their names."""
    return sorted(folder for folder in islice(_walk(path, DEPTH), LOOKED_AT) if holds_checkpoint(folder))


def _walk(path: Path, depth: int) -> Iterator[Path]:
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return
    yield from folders
    if depth > 1:
        for folder in folders:
            yield from _walk(folder, depth - 1)


def _find_above(path: Path, holds_checkpoint: HoldsCheckpoint) -> Path | None:
    """The folder above `path` that holds a checkpoint; None if there is none near."""
    return next((folder for folder in path.absolute().parents[:ABOVE] if holds_checkpoint(folder)), None)


def _suggest_sibling(path: Path) -> str:
    """A name like that of `path` in the same folder."""
    try:
        names = [] if path.exists() else [entry.name for entry in islice(os.scandir(path.parent), 1000)]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / close[0]}?" if close else ""
