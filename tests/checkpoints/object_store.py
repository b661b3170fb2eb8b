"""A stand-in for an object store, which serves a directory of this machine as a URL."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import blobfile
import pytest
from tiny import write_checkpoint

from llama.accelerate.kernels.cpu import library

URL = "gs://bucket/models/tiny"


class Store:
    """Serves a directory as URL, and counts what is read from it."""

    def __init__(self, directory: Path):
        self.directory, self.read = directory, Counter[str]()
        self.broken: str | None = None

    def path(self, url: str) -> Path:
        if not url.startswith(URL):
            raise blobfile.Error(f"no such bucket:\n{url}")
        return self.directory / url.removeprefix(URL).lstrip("/")

    def scandir(self, url: str) -> Iterator[blobfile.DirEntry]:
        for path in sorted(self.path(url).iterdir()):
            stat = path.stat()
            found = blobfile.Stat(size=stat.st_size, mtime=stat.st_mtime, ctime=0.0, md5=None, version=None)
            yield blobfile.DirEntry(str(path), path.name, path.is_dir(), path.is_file(), found)

    def open(self, url: str, mode: str) -> io.BytesIO:
        self.read[url.removeprefix(URL + "/")] += 1
        data = self.path(url).read_bytes()
        if self.broken == self.path(url).name:
            return Torn(data[: len(data) // 2])
        return io.BytesIO(data)


class Torn(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise blobfile.Error("connection reset")
        return data


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(write_checkpoint(tmp_path / "far"))
    library()  # else it would be compiled into the home below
    monkeypatch.setattr(blobfile, "scandir", store.scandir)
    monkeypatch.setattr(blobfile, "BlobFile", store.open)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return store
