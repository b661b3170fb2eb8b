"""The output of a long job of numbered records, which a run that was killed at any moment resumes.

OUTPUT.part holds the finished records until all are there; a kill loses at most one batch. Knows numbered records and
files; knows no prompts and no models.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._util.files import open_file, refuse_unwritable
from .._util.resumable import BEGIN_ANEW, check_same_job, refuse_damaged
from ..errors import LlamaError

if sys.platform != "win32":
    import fcntl


def encode_record(value: dict[str, Any]) -> bytes:
    """A line of JSON in UTF-8. Lone surrogates stay escaped, since UTF-8 has no bytes for them."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class ResumableRecords:
    """The finished records by number, and the file that holds them until `finish` sorts them into the output.

    The file's first line describes the job. Then come the records, a line each, with an empty line after every batch.
    A kill may cut off what follows the last empty line. That batch is dropped and computed again as a whole, because
    rounding may depend on what is in a batch: only the same batch is sure to give the same answers.
    """

    path: Path  # of the file of finished records: OUTPUT.part
    places: dict[int, tuple[int, int]]  # (offset, bytes) in `path` of each record, by its number
    errors: int  # how many records hold an error
    fixed: dict[str, Any]  # values that stay as they were when the job was begun

    def __init__(self, output: Path, job: dict[str, Any], fixed: dict[str, Any], force: bool):
        """Resume the job, or begin it. Raises LlamaError, naming --force, if `output` is of another job.

        job: the description of this job; a file of another job is refused. fixed: the values of `self.fixed` if the job
        is begun now.
        """
        self.output = output
        self.path, self._sorted = sibling_path(output, "part"), sibling_path(output, "sorted")
        self.places, self.errors = {}, 0
        if output.exists() and not output.is_file():
            raise LlamaError(f"{output} is no file: expected the name of one to write")
        if output.exists() and not self.path.exists() and not force:
            raise LlamaError(f"{output} is complete already: {BEGIN_ANEW}")
        with refuse_unwritable(self.path):
            self._file = open_file(self.path, "a+b")
            self._lock()
            if force:
                self._file.truncate(0)
            self.fixed = self._resume(job)
            if not self.fixed:
                self.fixed = fixed
                self._file.truncate(0)  # drops a first line that was cut off
                self._append(encode_record({"about": job, "fixed": fixed}))

    def _lock(self) -> None:
        """Lock the file until this process ends: ranks may outlive a torchrun that was killed."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlamaError(f"{self.path} is being written by another process: wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks

    def _resume(self, job: dict[str, Any]) -> dict[str, Any]:
        """Index the records and drop what was cut off. Returns the file's `fixed`, {} if it has no whole first line."""
        self._file.seek(0)
        first = self._file.readline()
        self._end = len(first)
        if not first.endswith(b"\n"):
            self._end = 0
            return {}
        with refuse_damaged(self.path, "a file of this command"):
            header = json.loads(first)
            recorded_job, fixed = dict(header["about"]), dict(header["fixed"])
        check_same_job(self.path, recorded_job, job)
        with refuse_damaged(self.path, "a file of this command"):
            self._index_records()
        return fixed

    def _index_records(self) -> None:
        """Find the records of all whole batches, from the file's current position on, and cut off the rest."""
        whole = self._end  # where the last whole batch ends
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

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._end += len(data)

    def add(self, batch: Sequence[dict[str, Any]]) -> None:
        """Append the records of one batch. Each has its number as "line", and an "error" if it failed."""
        data = b""
        for record in batch:
            line = encode_record(record)
            self.places[record["line"]] = (self._end + len(data), len(line))
            self.errors += "error" in record
            data += line
        with refuse_unwritable(self.path):
            self._append(data + b"\n")

    def finish(self) -> None:
        """Write all records in the order of their numbers to the output, whole or not at all; remove `path`."""
        with refuse_unwritable(self.output):
            with open_file(self._sorted, "wb") as f:
                for number in sorted(self.places):
                    offset, length = self.places[number]
                    self._file.seek(offset)
                    f.write(self._file.read(length))
            os.replace(self._sorted, self.output)
            self.path.unlink()
            self._file.close()


def sibling_path(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
