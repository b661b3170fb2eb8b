"""Compiles csrc/ once for each processor and compiler; keeps the library, or why there is none, in `~/.cache/llama`.

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

if sys.platform != "win32":
    import fcntl

SOURCES = ("calls.c", "products.c", "integers.c", "attention.c", "ranks.c")  # in csrc/, with HEADER
HEADER = "vectors.h"
FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
SECONDS_TO_COMPILE = 40  # all sources; 3 on a free machine, 16 on a busy one
SECONDS_BEFORE_WORD = 3  # that compiling may take before the user is told what takes so long
SECONDS_REMEMBERED = 24 * 3600  # that a failure is: what the compiler lacks may be installed without a trace in it
SECONDS_OF_GRACE = 60  # in which a directory that isn't locked yet may belong to a process that runs
PRIVATE = 0o700
NOT_FOR_THIS_PROCESSOR = "vectors of 64 bytes are needed"  # as HEADER says it
ELSE = "torch's own operations are used, which are slower"


def load_library(names: Sequence[str]) -> ctypes.CDLL | None:
    """The compiled SOURCES, which have functions of these names. None where they can't be compiled or loaded.

    What a user can mend is said; that there is no compiler, or none for this processor, isn't.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        directory = cache_home() / "kernels"
        make_private(directory)
        sweep(directory)
        path = directory / f"{find_key(compiler)}.so"
        return load(path, names) or (None if is_remembered(path) else build(path, names, compiler))
    except LlamaError as e:
        print_note(f"{e}; {ELSE}")
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return None


def source_paths() -> list[Path]:
    return [Path(__file__).with_name("csrc") / name for name in (*SOURCES, HEADER)]


def find_key(compiler: str) -> str:
    """The name of the library that this compiler makes here. Another version of it is another file."""
    file = os.stat(compiler)
    content = b"".join(path.read_bytes() for path in source_paths())
    version = os.path.realpath(compiler), file.st_size, file.st_mtime_ns
    return hashlib.sha256(content + repr((FLAGS, version, processor())).encode()).hexdigest()[:32]


def processor() -> str:
    """A description of the processor, on which the compiled code depends."""
    return cpuinfo("flags", "Features") or f"{platform.machine()} {platform.processor()}"


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
    """Whether a library ends with the hash of all before, as `build` writes it, and nobody else can have written it.

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


def is_remembered(path: Path) -> bool:
    """Whether this library could not be made lately. Says so where a user may do something about it."""
    failure = path.with_suffix(".failed")
    try:
        if time.time() - failure.stat().st_mtime > SECONDS_REMEMBERED or not is_own(failure.stat()):
            return False
        tell(read_text(failure), failure)
    except (OSError, ValueError):  # it is gone, or is no text of ours
        return False
    return True


def remember(path: Path, reason: str) -> None:
    failure = path.with_suffix(".failed")
    with contextlib.suppress(OSError, LlamaError):
        write_whole(failure, lambda f: f.write(reason.encode()), mode=0o600)
    tell(reason, failure)


def tell(reason: str, failure: Path) -> None:
    """Say why there are no kernels, except on a processor that they aren't for."""
    if NOT_FOR_THIS_PROCESSOR not in reason:
        print_note(f"the kernels can't be compiled ({to_one_line(reason)}): {ELSE}; remove {failure} to try again")


# --- compiling --------------------------------------------------------------------------------------------------------


def build(path: Path, names: Sequence[str], compiler: str) -> ctypes.CDLL | None:
    """Compile the library and load it. If that fails, None, and the failure is remembered for other processes."""
    try:
        with make_locked_directory(path.parent) as directory:
            linked = compile_in(directory, compiler)
            linked.chmod(PRIVATE)  # whatever the umask is
            with linked.open("r+b") as f:
                f.write(hashlib.sha256(f.read()).digest())
            # Loaded by this name: dlopen would take a library that was loaded from `path` for this one.
            if (library := load(linked, names)) is None:
                raise BuildError(f"what {compiler} made is no library of these functions")
            os.replace(linked, path)  # ranks may do this at the same time
            return library
    except BuildError as e:
        remember(path, str(e))
        return None


def compile_in(directory: Path, compiler: str) -> Path:
    """Compile SOURCES in this directory; returns the library.

    It is not linked with OpenMP: it uses torch's, so that both share one set of threads.
    """
    started = time.monotonic()
    *sources, _ = source_paths()
    run([[compiler, *FLAGS, "-fopenmp", "-fPIC", "-c", str(source)] for source in sources], directory, started)
    linked = directory / "kernels.so"
    objects = [source.with_suffix(".o").name for source in sources]
    run([[compiler, "-shared", *objects, "-o", str(linked)]], directory, started)
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
                    raise BuildError(f"{commands[0][0]} wasn't done after {SECONDS_TO_COMPILE} s")
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
