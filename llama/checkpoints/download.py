"""Checkpoints in object stores (`gs://...`, `az://...`), copied once to a cache on this machine's disk by blobfile.

Knows URLs; knows no formats and no ranks.
"""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from urllib.parse import quote

from .._util.console import ProgressBar, progress_bar
from .._util.files import cache_home, write_whole
from ..errors import LlamaError

CHUNK = 1 << 24
SUBDIRECTORY = "original"  # the only folder of a checkpoint that is looked into


def is_url(path: object) -> bool:
    return "://" in str(path)


def cache_directory(url: str, cache: Path | None = None) -> Path:
    """Where the copy of `url` lies: in `cache`, by default `~/.cache/llama`."""
    return (cache_home() if cache is None else cache) / quote(url.rstrip("/"), safe="")


def local_copy(url: str, cache: Path | None = None) -> Path:
    """Make the cache hold what the directory at `url` holds; what is as large and as new isn't copied. Returns where.

    Each file appears whole or not at all. Raises LlamaError for a store that doesn't answer, and a disk too small.
    """
    import blobfile  # here, since it takes longer to import than all else in this file

    target = cache_directory(url, cache)
    try:
        files = list(_files(blobfile, url, target))
        there = {path for _, path, _ in files}
        stale = [(source, path, stat) for source, path, stat in files if not _is_copy(path, stat)]
        size = sum(stat.size for _, _, stat in stale)
        target.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(target).free):
            raise LlamaError(f"{url} has {size / 1e9:.2f} GB to copy, and {target} has {free / 1e9:.2f} GB free")
        with progress_bar("copying", size, "B") as bar:
            for source, path, stat in stale:
                path.parent.mkdir(parents=True, exist_ok=True)
                with blobfile.BlobFile(source, "rb") as reader:
                    write_whole(path, partial(_pour, reader, bar))
                os.utime(path, (stat.mtime, stat.mtime))
        for gone in {path for path in target.rglob("*") if path.is_file()} - there:
            gone.unlink()
    except (OSError, ValueError, blobfile.Error) as e:
        raise LlamaError(f"{url} can't be read ({' '.join(str(e).split())}): is it a directory you may read?") from e
    return target


def _pour(reader: IO[bytes], bar: ProgressBar, writer: IO[bytes]) -> None:
    while chunk := reader.read(CHUNK):
        bar.update(writer.write(chunk))


def _files(blobfile: ModuleType, url: str, target: Path) -> Iterator[tuple[str, Path, Any]]:
    """(URL, path of its copy, size and time) of each file."""
    for entry in blobfile.scandir(url):
        if entry.is_dir and entry.name == SUBDIRECTORY:
            yield from _files(blobfile, blobfile.join(url, SUBDIRECTORY), target / SUBDIRECTORY)
        elif entry.is_file:
            source, path = blobfile.join(url, entry.name), target / entry.name
            yield source, path, entry.stat or blobfile.stat(source)


def _is_copy(path: Path, stat: Any) -> bool:
    known = path.stat() if path.is_file() else None
    return known is not None and (known.st_size, int(known.st_mtime)) == (stat.size, int(stat.mtime))
