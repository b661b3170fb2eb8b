"""Checkpoints in object stores (`gs://...`, `az://...`): blobfile copies them once to a cache on this machine's disk.

Knows URLs; knows no formats and no ranks.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from urllib.parse import quote

from .._util.console import ProgressBar, progress_bar
from .._util.files import cache_home, is_plain_name, write_whole
from ..errors import LlamaError, shorten

CHUNK_BYTES = 1 << 24  # read and written at a time
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # the disk, a file, or a quota
SUBDIRECTORY = "original"  # the only folder of a checkpoint whose files are copied too


def cache_directory(url: str, cache: Path | None = None) -> Path:
    """Where the copy of `url` is: in `cache`, by default `~/.cache/llama`."""
    return (cache_home() if cache is None else cache) / quote(url.rstrip("/"), safe="")


def copy_to_cache(url: str, cache: Path | None = None) -> Path:
    """Copy the files of the directory at `url` to the cache, and remove others there. Returns the cache's directory.

    A file whose copy has the same size and time isn't copied again. Each file appears whole or not at all.
    Raises LlamaError for a store that doesn't answer, and for a disk that is too small.
    """
    import blobfile  # here, since its import takes longer than the rest of this file's

    target = cache_directory(url, cache)
    try:
        files = list(_list_files(blobfile, url, target))
        copies = {path for _, path, _ in files}
        stale = [(source, path, stat) for source, path, stat in files if not _is_copy(path, stat)]
        size = sum(stat.size for _, _, stat in stale)
        target.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(target).free):
            raise LlamaError(f"{url} has {size / 1e9:.2f} GB to copy, and {target} has {free / 1e9:.2f} GB free")
        with progress_bar("copying", size, "B") as bar:
            for source, path, stat in stale:
                path.parent.mkdir(parents=True, exist_ok=True)
                with blobfile.BlobFile(source, "rb") as reader:
                    _write_copy(path, partial(_copy_chunks, reader, bar))
                os.utime(path, (stat.mtime, stat.mtime))
        for surplus in {path for path in target.rglob("*") if path.is_file()} - copies:
            surplus.unlink()
    except LlamaError:
        raise
    except (OSError, ValueError, blobfile.Error) as e:
        raise LlamaError(f"{url} can't be read ({' '.join(str(e).split())}): is it a directory you may read?") from e
    return target


def _write_copy(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """As `write_whole`. Raises LlamaError where the disk is full, since the store isn't to blame for that."""
    try:
        write_whole(path, write)
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise LlamaError(f"{path} can't be written ({e.strerror}): make room in {path.parent}") from e


def _copy_chunks(reader: IO[bytes], bar: ProgressBar, writer: IO[bytes]) -> None:
    while chunk := reader.read(CHUNK_BYTES):
        bar.update(writer.write(chunk))


def _list_files(blobfile: ModuleType, url: str, target: Path) -> Iterator[tuple[str, Path, Any]]:
    """(URL, path of the copy, size and time) of each file. Raises LlamaError for a name that leads out of `target`."""
    for entry in blobfile.scandir(url):
        if entry.is_dir and entry.name == SUBDIRECTORY:
            yield from _list_files(blobfile, blobfile.join(url, SUBDIRECTORY), target / SUBDIRECTORY)
        elif entry.is_file:
            if not is_plain_name(entry.name):
                raise LlamaError(f"{url} has a file called {shorten(entry.name)}, which is refused: it may be a path")
            source, path = blobfile.join(url, entry.name), target / entry.name
            yield source, path, entry.stat or blobfile.stat(source)


def _is_copy(path: Path, stat: Any) -> bool:
    copy = path.stat() if path.is_file() else None
    return copy is not None and (copy.st_size, int(copy.st_mtime)) == (stat.size, int(stat.mtime))
