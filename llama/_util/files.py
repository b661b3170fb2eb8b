"""Reads files with errors of one line, and writes files and directories whole or not at all.

Knows JSON; knows no format of a checkpoint.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import LlamaError, to_one_line

PARTIAL = ".partial-"  # in the names of files and directories that are being written


def cache_home() -> Path:
    """The directory of files that can be downloaded or computed again."""
    return Path.home() / ".cache" / "llama"


def unreadable_error(path: Path, e: OSError) -> LlamaError:
    """The error to raise for a file that the system doesn't let us read."""
    return LlamaError(f"{path} can't be read ({e.strerror}): expected a file that you may read")


def describe_content(path: Path) -> str:
    """For an error message: what a file seems to be that isn't in the format that its name says."""
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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file. what: what it describes. Raises LlamaError for a file that holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise unreadable_error(path, e) from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; too many brackets
        raise LlamaError(f"{path} is not JSON ({e}): {describe_content(path)}; download it again") from None
    if not isinstance(value, dict):
        raise LlamaError(f"{path}: expected a JSON object of {what}, found a {type(value).__name__}")
    return value


def write_whole(path: Path, write: Callable[[IO[bytes]], object], mode: int = 0o644) -> None:
    """Call `write(file)` on a temporary file beside `path`, and rename it to `path` if that succeeds.

    mode: the file's permissions.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + PARTIAL, delete=False) as f:
        try:
            write(f)
            f.close()
            os.chmod(f.name, mode)
            os.replace(f.name, path)
        except BaseException:
            f.close()
            os.unlink(f.name)
            raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` as JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda f: f.write(text.encode()))


@contextlib.contextmanager
def make_unfinished_directory(target: Path) -> Iterator[Path]:
    """A temporary directory in `target` to write to, as a context. The caller moves its files into place afterwards.

    If the context fails, the directory is removed, and so is `target` if it is new.
    """
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        for abandoned in target.glob(PARTIAL + "*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target))
        yield unfinished
    except BaseException:
        for remnant in [target] if is_new else target.glob(PARTIAL + "*"):
            shutil.rmtree(remnant, ignore_errors=True)
        raise


@contextlib.contextmanager
def refuse_unwritable(path: Path | str) -> Iterator[None]:
    """Raise LlamaError for errors of the system in this context, which writes to `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # RuntimeError: what torch.save raises when the disk is full
        raise LlamaError(f"{path} can't be written ({to_one_line(e)}): expected a place that you may write to") from e
