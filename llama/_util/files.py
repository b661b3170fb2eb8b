"""Files of strangers, read with errors of one line; and files of our own, written whole or not at all.

Knows no formats of checkpoints.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import LlamaError

PARTIAL = ".partial-"


def cache_home() -> Path:
    """What can be made again lies here."""
    return Path.home() / ".cache" / "llama"


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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`, which holds `what`. Raises LlamaError for a file that holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from e
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; brackets without end
        raise LlamaError(f"{path} is not JSON ({e}): {describe_content(path)}; download it again") from None
    if not isinstance(value, dict):
        raise LlamaError(f"{path}: expected a JSON object of {what}, found a {type(value).__name__}")
    return value


def write_whole(path: Path, write: Callable[[IO[bytes]], object], mode: int = 0o644) -> None:
    """Call `write(file)` on a temporary file beside `path` and rename it there: the file is whole or not at all."""
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
    """Write `value` to `path`, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda f: f.write(text.encode()))


@contextlib.contextmanager
def unfinished_directory(target: Path) -> Iterator[Path]:
    """A directory in `target` to write to. Whatever fails in this context leaves nothing of it, nor a new `target`."""
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        for killed in target.glob(PARTIAL + "*"):  # which could not tidy up
            shutil.rmtree(killed, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target))
        yield unfinished
    except BaseException:
        for left in [target] if new else target.glob(PARTIAL + "*"):
            shutil.rmtree(left, ignore_errors=True)
        raise
