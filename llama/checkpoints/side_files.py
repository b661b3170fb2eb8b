"""The files beside a checkpoint's tensors: its tokenizer and its settings.

Knows where they are; knows nothing of their contents.
"""

from pathlib import Path

from .._util.files import open_file
from ..errors import LlamaError
from .checkpoint import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_SETTINGS = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
SETTINGS = (*TOKENIZER_SETTINGS, "generation_config.json")


def find_side_files(checkpoint: Checkpoint, *names: str) -> list[Path]:
    """The files of these names, in the checkpoint's directory first, then in its parent or child of `original/`."""
    directory = checkpoint.directory
    folders = [directory, directory.parent if directory.name == "original" else directory / "original"]
    return [folder / name for folder in folders for name in names if (folder / name).exists()]


def find_tokenizer_files(checkpoint: Checkpoint, *names: str) -> list[Path]:
    """As `find_side_files`, of files of a tokenizer: only an adapter's, if a tokenizer was saved with it."""
    adapter = checkpoint.adapter
    if adapter is None or not any((adapter / name).is_file() for name in TOKENIZERS):
        return find_side_files(checkpoint, *names)
    return [adapter / name for name in names if (adapter / name).is_file()]


def find_tokenizer(checkpoint: Checkpoint) -> Path:
    """The tokenizer's file of the checkpoint's format, or else another's; if there is none, where it should be."""
    names = checkpoint.format.tokenizers
    paths = find_tokenizer_files(checkpoint, *names)
    readable = [path for path in paths if not is_sentencepiece(path)]
    return (readable or paths or [checkpoint.directory / names[0]])[0]


def is_sentencepiece(path: Path) -> bool:
    """Whether it is a `tokenizer.model` that isn't text, which isn't read. Mostly a tokenizer.json is beside it."""
    try:
        with open_file(path) as f:
            return path.name == "tokenizer.model" and b"\0" in f.read(4096)
    except (OSError, LlamaError):
        return False  # opening it later will raise the error


def find_broken_links(checkpoint: Checkpoint) -> list[Path]:
    """Links to nothing where such a file should be. They would be passed over as files that are optional."""
    directory = checkpoint.directory
    folders = [directory, directory.parent] if directory.name == "original" else [directory]
    paths = [folder / name for folder in folders for name in SETTINGS]
    return [path for path in paths if path.is_symlink() and not path.exists()]
