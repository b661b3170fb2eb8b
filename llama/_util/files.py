"""Reads files with errors of one line, and writes files and directories whole or not at all.

Every file of this package is opened here, or after `check_file`. Knows JSON; knows no format of a checkpoint.
"""

import contextlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

from safetensors import SafetensorError

from ..errors import LlamaError, shorten, to_one_line

if sys.platform != "win32":
    import pwd

LONGEST_NAME = 200  # of a file that somebody else names
PARTIAL = ".partial-"  # in the names of files and directories that are being written
NO_FILES = {  # what may be at a path that isn't a file: its name in messages
    stat.S_IFDIR: "Is a directory",
    stat.S_IFIFO: "Is a pipe",
    stat.S_IFSOCK: "Is a socket",
    stat.S_IFCHR: "Is a device",
    stat.S_IFBLK: "Is a device",
}


def cache_home() -> Path:
    """The directory of files that can be downloaded or computed again. Raises RuntimeError where there is no home."""
    home = Path.home()
    if sys.platform != "win32" and (
        not home.is_absolute() or os.environ.get("HOME") == ""
    ):  # Python takes "/" for the latter
        try:
            home = Path(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError as e:
            raise RuntimeError("this user has no home directory") from e
    return home / ".cache" / "llama"


def check_expanded(path: str | os.PathLike) -> None:
    """Raise LlamaError for a path that begins with `~` or `$NAME`, which a shell should have replaced."""
    first, *rest = Path(path).parts or ("",)
    expanded = os.path.expandvars(os.path.expanduser(first))
    if expanded != first and not os.path.lexists(first):
        raise LlamaError(
            f"{shorten(str(path))} begins with {first}, which only a shell replaces, and not in quotes or after a =: "
            f"write {Path(expanded, *rest)}"
        )


def describe_failure(e: OSError) -> str:
    """Why the system refused, in a few words."""
    return e.strerror or to_one_line(e) or type(e).__name__


def unreadable_error(path: Path, e: OSError) -> LlamaError:
    """The error to raise for a file that the system doesn't let us read. Raises that of `check_expanded` instead."""
    check_expanded(path)
    return LlamaError(f"{path} can't be read ({describe_failure(e)}): expected a file that you may read")


def describe_missing(path: Path) -> str:
    """For an error message: that a file isn't there; or that a link is, and what it links to isn't."""
    if path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which isn't there"
    return f"{path} is missing"


def check_file(path: Path | str | os.PathLike[str], used: str = "read") -> None:
    """Raise LlamaError if something is at `path` that is no file, such as a pipe, which may wait or never end.

    Where nothing is, nothing is raised: whoever opens it says so. used: "read" or "written", for the message.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        reason = NO_FILES.get(stat.S_IFMT(mode), "Is no file")
        raise LlamaError(f"{path} can't be {used} ({reason}): expected a file")


def open_file(path: Path | str | os.PathLike[str], mode: str = "rb") -> io.BufferedIOBase:
    """Open a file of bytes. Raises LlamaError as `check_file` does, and OSError as `open` does."""
    check_file(path, "read" if mode == "rb" else "written")
    return cast(io.BufferedIOBase, open(path, mode))


def read_bytes(path: Path | str | os.PathLike[str]) -> bytes:
    """All of a file. Raises as `open_file` does."""
    with open_file(path) as f:
        return f.read()


def read_text(path: Path) -> str:
    """All of a file of UTF-8, its line ends as "\n". Raises as `open_file` does, and UnicodeDecodeError."""
    return io.StringIO(read_bytes(path).decode(), newline=None).read()


def describe_content(path: Path) -> str:
    """For an error message: what a file seems to be that isn't in the format that its name says."""
    with open_file(path) as f:
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
        content = read_bytes(path)
    except OSError as e:
        raise unreadable_error(path, e) from e
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; too many brackets
        raise LlamaError(f"{path} is not JSON ({e}): {describe_content(path)}; download it again") from None
    if not isinstance(value, dict):
        raise LlamaError(f"{path}: expected a JSON object of {what}, found a {type(value).__name__}")
    return value


def write_whole(path: Path, write: Callable[[IO[bytes]], object], mode: int = 0o644) -> None:
    """Call `write(file)` on a temporary file beside `path`, and rename it to `path` if that succeeds.

    mode: the file's permissions. Raises LlamaError as `check_file` does.
    """
    check_file(path, "written")  # renaming would replace a device or a pipe
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

    If the context fails, the directory is removed, and so is `target` if it is new. Raises LlamaError for a `target`
    that a shell should have expanded.
    """
    check_expanded(target)
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
    check_expanded(path)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # all three are raised where the disk is full
        expected = "expected a place that you may write to, with room for it"
        raise LlamaError(f"{path} can't be written ({describe_write_error(e)}): {expected}") from e


def describe_write_error(error: BaseException) -> str:
    """Why the system didn't write. torch.save raises its own error, and has the system's as its context."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__context__
    if isinstance(cause, OSError):
        return str(cause.strerror)
    text = to_one_line(error)
    return "is the disk full?" if text.startswith("[enforce fail") else text


def is_plain_name(name: str) -> bool:
    """Whether a name that somebody else chose names a file in a directory, on any system, and none elsewhere."""
    is_inside = all(kind(name).name == name != "" for kind in (PurePosixPath, PureWindowsPath))
    return is_inside and name != ".." and name.isprintable() and len(name) <= LONGEST_NAME
