"""OUTPUT.part: what of a long job is done, on disk at once, so that a kill at any moment loses at most one batch.

Knows numbered records and files; knows nothing of prompts and models.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlamaError, shorten

if sys.platform != "win32":
    import fcntl

BEGIN_ANEW = "start with --force to begin anew"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises LlamaError for what the system refuses."""
    try:
        yield
    except OSError as e:
        raise LlamaError(f"{path} can't be written ({e.strerror}): expected a file that you may write") from e


def as_line(value: dict[str, Any]) -> bytes:
    """JSON in UTF-8; lone surrogates, which UTF-8 doesn't have, stay escaped as they were."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class Part:
    """The records that there are, by number, and the file that they are in until `finish` puts them in order.

    Its first line says what they are of; then records, a line each, and an empty line after those of every batch. What
    follows the last empty line was cut off by a kill. It is dropped, and the whole batch done again: rounding may
    depend on what is in a batch, so that only the same batch surely gives the same answers.
    """

    def __init__(self, output: Path, about: dict[str, Any], fixed: dict[str, Any], force: bool):
        """Take up what was begun, or begin. Raises LlamaError, naming --force, for the records of another job.

        about: what makes it this job and no other. fixed: what is kept from its beginning on; see `self.fixed`.
        """
        self.output, self.path, self.fresh = output, beside(output, "part"), beside(output, "sorted")
        self.places: dict[int, tuple[int, int]] = {}  # of each record: offset, bytes
        self.errors = 0
        if output.exists() and not output.is_file():
            raise LlamaError(f"{output} is no file: expected the name of one to write")
        if output.exists() and not self.path.exists() and not force:
            raise LlamaError(f"{output} is complete already: name another --output, or {BEGIN_ANEW}")
        with writing(self.path):
            self._file = self.path.open("a+b")
            self._lock()
            if force:
                self._file.truncate(0)
            self.fixed = self._read(about)
            if not self.fixed:
                self.fixed = fixed
                self._file.truncate(0)  # a first line that was cut off
                self._append(as_line({"about": about, "fixed": fixed}))

    def _lock(self) -> None:
        """For as long as this process lives: ranks may outlive a torchrun that was killed."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlamaError(f"{self.path} is being written by another process: wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks

    def _read(self, about: dict[str, Any]) -> dict[str, Any]:
        """Find the records, drop what was cut off; `fixed` of the first line, empty where there is none."""
        self._file.seek(0)
        first = self._file.readline()
        self._end = whole = len(first)
        if not first.endswith(b"\n"):
            self._end = 0
            return {}
        try:
            head = json.loads(first)
            self._compare(head["about"], about)
            batch: dict[int, tuple[int, int]] = {}
            errors = 0
            for line in self._file:
                if line == b"\n":
                    self.places |= batch
                    self.errors += errors
                    batch, errors, whole = {}, 0, self._end + 1
                elif line.endswith(b"\n"):
                    record = json.loads(line)
                    batch[record["line"]] = (self._end, len(line))
                    errors += "error" in record
                self._end += len(line)
            self._file.truncate(whole)
            self._end = whole
            return head["fixed"]
        except LlamaError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LlamaError(f"{self.path} is damaged, or no file of this command: {BEGIN_ANEW}") from None

    def _compare(self, found: dict[str, Any], about: dict[str, Any]) -> None:
        for name in about:
            if found.get(name) != about[name]:
                was, now = shorten(found.get(name)), shorten(about[name])
                raise LlamaError(
                    f"{self.path} was begun with another {name} ({was}, now {now}): go on as it was begun, or "
                    f"{BEGIN_ANEW}"
                )

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._end += len(data)

    def add(self, batch: Sequence[dict[str, Any]]) -> None:
        """Records that were made together: "line" is the number of each, and "error" in those that are mistakes."""
        data = b""
        for record in batch:
            line = as_line(record)
            self.places[record["line"]] = (self._end + len(data), len(line))
            self.errors += "error" in record
            data += line
        with writing(self.path):
            self._append(data + b"\n")

    def finish(self) -> None:
        """Write the records in their order to the output, which is whole or not there at all."""
        with writing(self.output):
            with self.fresh.open("wb") as f:
                for number in sorted(self.places):
                    offset, length = self.places[number]
                    self._file.seek(offset)
                    f.write(self._file.read(length))
            os.replace(self.fresh, self.output)
            self.path.unlink()
            self._file.close()


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
