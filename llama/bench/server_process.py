"""`python -m llama serve` as a process of its own, at a free port: it is started, watched and ended.

Knows the command and its first line; knows no protocol.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import LlamaError, to_one_line

SECONDS_TO_START = 300
SECONDS_TO_STOP = 30
LISTENS = re.compile(r"serving .* at http://([\d.]+):(\d+)/v1")


class ServerProcess:
    """A server until `close`. Raises LlamaError if it can't be started."""

    def __init__(self, options: Sequence[str]):
        """options: of the command."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # see close
        words = [sys.executable, "-m", "llama", "serve", "--port", "0", *options]
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self.address = self._wait_for_address()
        except BaseException:
            self.close()
            raise

    def _wait_for_address(self) -> tuple[str, int]:
        deadline = time.monotonic() + SECONDS_TO_START
        while not (found := LISTENS.search(self._read_log())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self._read_log().splitlines() or ["nothing was said"])[-1]
                raise LlamaError(f"python -m llama serve didn't start: {to_one_line(said)}")
            time.sleep(0.1)
        return found[1], int(found[2])

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def measure_memory(self) -> int | None:
        """Bytes of memory of its own that it holds now; None if the system doesn't say."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        return None if found is None else int(found[1]) * 1024

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
