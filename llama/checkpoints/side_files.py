"""The files beside a checkpoint's tensors: its tokenizer and its settings.

Knows where they are; knows nothing of their contents.
"""

from pathlib import Path

from .checkpoint import Checkpoint


def find_side_files(checkpoint: Checkpoint, *names: str) -> list[Path]:
    """The files of these names, in the checkpoint's directory first, then in its parent or child of `original/`."""
    directory = checkpoint.directory
    folders = [directory, directory.parent if directory.name == "original" else directory / "original"]
    return [folder / name for folder in folders for name in names if (folder / name).is_file()]


def find_tokenizer(checkpoint: Checkpoint) -> Path:
    """The tokenizer's file of the checkpoint's format, or else another's; if there is none, where it should be."""
    names = checkpoint.format.tokenizers
    paths = find_side_files(checkpoint, *names)
    readable = [path for path in paths if not is_sentencepiece(path)]
    return (readable or paths or [checkpoint.directory / names[0]])[0]


def is_sentencepiece(path: Path) -> bool:
    """Whether it is a `tokenizer.model` that isn't text, which isn't read. Mostly a tokenizer.json is beside it."""
    try:
        with path.open("rb") as f:
            return path.name == "tokenizer.model" and b"\0" in f.read(4096)
    except OSError:
        return False  # opening it later will raise the error
