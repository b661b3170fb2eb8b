"""Finds the library of csrc/ for a level of processors: in the package, or compiled once, in `~/.cache/llama`.

Knows files and compilers; knows no function but by its name. What is kept is code that runs in this process: so it is
read only from a directory that nobody else may write to.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..._util.console import print_note
from ..._util.files import PARTIAL, cache_home, read_text, write_whole
from ...errors import LlamaError, to_one_line
from .levels import HEADERS, SOURCES, Level, compile_commands, find_compiler, link_command, seal

if sys.platform != "win32":
    import fcntl

SECONDS_TO_COMPILE = 40  # all sources; 3 on a free machine, 16 on a busy one
SECONDS_BEFORE_WORD = 3  # that compiling may take before the user is told what takes so long
SECONDS_REMEMBERED = 24 * 3600  # that a failure is: what the compiler lacks may be installed without a trace in it
SECONDS_OF_GRACE = 60  # in which a directory that isn't locked yet may belong to a process that runs
PRIVATE = 0o700
CSRC = Path(__file__).with_name("csrc")
BUILT = Path(__file__).with_name("built")  # libraries that a wheel brings, by the names of their levels
ELSE = "torch's own operations are used, which are slower"


def load_library(names: Sequence[str], levels: Sequence[Level]) -> ctypes.CDLL | None:
    """The compiled SOURCES, which have functions of these names, of the first of these levels that can be had.

    None where they can't be compiled or loaded. What a user can mend is said; that there is no compiler isn't.
    """
    for level in levels:
        if (library := load(BUILT / f"{level.name}.so", names)) is not None:
            return library
    if (compiler := find_compiler()) is None:
        return None
    try:
        directory = cache_home() / "kernels"
        make_private(directory)
        sweep(directory)
        files = {directory / f"{find_key(compiler, level)}.so": level for level in levels}
        return find_or_build(files, names, compiler)
    except LlamaError as e:
        print_note(f"{e}; {ELSE}")
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return None


def find_or_build(levels: dict[Path, Level], names: Sequence[str], compiler: str) -> ctypes.CDLL | None:
    """The first library that is there or can be made. A compiler may be too old for some levels.

    levels: by the files that are made of them.
    """
    failure = ""
    for path, level in levels.items():
        if (library := load(path, names)) is not None:
            return library
        try:
            failure = recall(path) or ""
            if not failure:
                return build(path, names, compiler, level)
        except BuildError as e:
            failure = str(e)
            for file in levels if isinstance(e, TooSlowError) else [path]:
                remember(file, failure)
    if failure:
        files = ", ".join(str(path.with_suffix(".failed")) for path in levels)
        print_note(f"the kernels can't be compiled ({to_one_line(failure)}): {ELSE}; remove {files} to try again")
    return None


def find_key(compiler: str, level: Level) -> str:
    """The name of the library that this compiler makes for a level. Another version of it is another file."""
    file = os.stat(compiler)
    content = b"".join((CSRC / name).read_bytes() for name in (*SOURCES, *HEADERS))
    commands = compile_commands(os.path.realpath(compiler), level, Path())
    made_by = commands, file.st_size, file.st_mtime_ns, platform.machine()
    return f"{level.name}-{hashlib.sha256(content + repr(made_by).encode()).hexdigest()[:32]}"


def cpuinfo(*keys: str) -> str | None:
    """The value of the first of these keys that Linux has for the first core; None on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), None)


# --- what may be trusted ----------------------------------------------------------------------------------------------


def make_private(directory: Path) -> None:
    """Make a directory that only this user may enter, and those above it that aren't there.

    Raises LlamaError if it, or the one above it, is there and others may have written to it.
    """
    for place in (*reversed(directory.parents), directory):
        if not place.is_dir():
            with contextlib.suppress(FileExistsError):  # another rank was faster
                place.mkdir(PRIVATE)
    for place in (directory.parent, directory):
        if not is_own(place.stat()):
            raise LlamaError(
                f"{place} may be written to by others, and it is for code that is run: expected a directory of your "
                f"own, as chmod 700 makes it; look who wrote to it, and remove {directory}"
            )
    if stat.S_IMODE(directory.stat().st_mode) != PRIVATE:
        directory.chmod(PRIVATE)


def is_own(file: os.stat_result) -> bool:
    """Whether only this user, or root, may write to it. A group of the user's own number has no other members."""
    if not hasattr(os, "getuid"):
        return True
    written_by_others = file.st_mode & stat.S_IWOTH or (file.st_mode & stat.S_IWGRP and file.st_gid != file.st_uid)
    return file.st_uid in (0, os.getuid()) and not written_by_others


def is_complete(path: Path) -> bool:
    """Whether a library ends with the hash of all before, as `seal` writes it, and nobody else can have written it.

    Loading an incomplete library would end the process.
    """
    try:
        file = path.stat()
        content = path.read_bytes() if stat.S_ISREG(file.st_mode) and is_own(file) else b""
    except OSError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def load(path: Path, names: Sequence[str]) -> ctypes.CDLL | None:
    """The library in a file; None if it isn't whole, or lacks one of these functions."""
    if not is_complete(path):
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    return library if all(hasattr(library, name) for name in names) else None


# --- failures ---------------------------------------------------------------------------------------------------------


class BuildError(Exception):
    """No library was made: the message is why, of one line or more."""


class TooSlowError(BuildError):
    """The compiler took longer than SECONDS_TO_COMPILE."""


def recall(path: Path) -> str | None:
    """Why this library could not be made lately; None: nobody has tried."""
    failure = path.with_suffix(".failed")
    try:
        if time.time() - failure.stat().st_mtime > SECONDS_REMEMBERED or not is_own(failure.stat()):
            return None
        return read_text(failure)
    except (OSError, ValueError):  # it is gone, or is no text of ours
        return None


def remember(path: Path, reason: str) -> None:
    with contextlib.suppress(OSError, LlamaError):
        write_whole(path.with_suffix(".failed"), lambda f: f.write(reason.encode()), mode=0o600)


# --- compiling --------------------------------------------------------------------------------------------------------


def build(path: Path, names: Sequence[str], compiler: str, level: Level) -> ctypes.CDLL:
    """Compile the library and load it. Raises BuildError."""
    with make_locked_directory(path.parent) as directory:
        linked = compile_in(directory, compiler, level)
        linked.chmod(PRIVATE)  # whatever the umask is
        linked.write_bytes(seal(linked.read_bytes()))
        # Loaded by this name: dlopen would take a library that was loaded from `path` for this one.
        if (library := load(linked, names)) is None:
            raise BuildError(f"what {compiler} made is no library of these functions")
        os.replace(linked, path)  # ranks may do this at the same time
        return library


def compile_in(directory: Path, compiler: str, level: Level) -> Path:
    """Compile SOURCES in this directory; returns the library. Raises BuildError."""
    started = time.monotonic()
    run(compile_commands(compiler, level, CSRC), directory, started)
    linked = directory / "kernels.so"
    run([link_command(compiler, linked)], directory, started)
    if not linked.is_file():
        raise BuildError(f"{compiler} wrote nothing")
    return linked


def run(commands: Sequence[Sequence[str]], directory: Path, started: float) -> None:
    """Run commands side by side. Raises BuildError if one fails, or isn't done SECONDS_TO_COMPILE after `started`.

    Nothing of them runs afterwards: each has a group of processes of its own, since a compiler starts others.
    """
    said = directory / "said"
    running: list[subprocess.Popen] = []
    is_told = time.monotonic() - started > SECONDS_BEFORE_WORD  # by the commands before
    with said.open("ab") as output:
        try:
            for command in commands:
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                running.append(subprocess.Popen(command, cwd=directory, start_new_session=True, **streams))  # type: ignore
            while any(process.poll() is None for process in running):
                seconds = time.monotonic() - started
                if seconds > SECONDS_BEFORE_WORD and not is_told:
                    is_told = True
                    print_note(f"compiling the kernels for this processor with {commands[0][0]} ...")
                if seconds > SECONDS_TO_COMPILE:
                    raise TooSlowError(f"{commands[0][0]} wasn't done after {SECONDS_TO_COMPILE} s")
                if any(process.poll() for process in running):
                    break
                time.sleep(0.01)
            if any(process.poll() != 0 for process in running):
                raise BuildError(f"{commands[0][0]} failed: {said.read_text(errors='replace')[:2000]}")
        except OSError as e:
            raise BuildError(f"{commands[0][0]} can't be run: {e.strerror}") from e
        finally:
            for process in running:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def make_locked_directory(parent: Path) -> Iterator[Path]:
    """A temporary directory, locked while this process lives, so that `sweep` of another one leaves it alone."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent, ignore_cleanup_errors=True) as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            lock(handle)
            yield Path(name)
        finally:
            os.close(handle)


def lock(handle: int) -> bool:
    """Lock an open directory, unless another process has; True if there are no locks here."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sweep(parent: Path) -> None:
    """Remove what builds left that were killed, those of earlier versions too."""
    for file in [*parent.glob(f"*.failed{PARTIAL}*")]:
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > SECONDS_OF_GRACE:
                file.unlink()
    for directory in [*parent.glob(f"{PARTIAL}*/"), *parent.glob("tmp*/")]:
        with contextlib.suppress(OSError):
            if time.time() - directory.stat().st_mtime < SECONDS_OF_GRACE and not any(directory.iterdir()):
                continue  # it may be locked in the next moment
            handle = os.open(directory, os.O_RDONLY)
            try:
                if lock(handle):
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)
