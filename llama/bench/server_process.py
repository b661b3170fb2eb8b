"""Servers as processes of their own: they are started, watched and ended. One is `python -m llama serve`.

Knows the command and its first line; knows no protocol.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import LlamaError, to_one_line

SECONDS_TO_START = 300
SECONDS_TO_STOP = 30
LISTENS = re.compile(r"serving .* at http://([\d.]+):(\d+)/v1")


class LoggedProcess:
    """A program until `close`, and what it has said."""

    def __init__(self, words: Sequence[str]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # see close
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        except BaseException:
            self._log.close()
            raise

    @property
    def id(self) -> int:
        return self._process.pid

    def read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait_until(self, is_ready: Callable[[], object]) -> bool:
        """Wait until a condition holds. False: the program has ended before, or it takes too long."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class ServerProcess:
    """This package's server, at a free port, until `close`. Raises LlamaError if it can't be started."""

    def __init__(self, options: Sequence[str]):
        """options: of the command."""
        self._process = LoggedProcess([sys.executable, "-m", "llama", "serve", "--port", "0", *options])
        try:
            self.address = self._wait_for_address()
        except BaseException:
            self.close()
            raise

    def _wait_for_address(self) -> tuple[str, int]:
        self._process.wait_until(lambda: LISTENS.search(self._process.read_log()))
        log = self._process.read_log()
        if (found := LISTENS.search(log)) is None:
            said = (log.splitlines() or ["nothing was said"])[-1]
            raise LlamaError(f"python -m llama serve didn't start: {to_one_line(said)}")
        return found[1], int(found[2])

    def measure_memory(self) -> int | None:
        """Bytes of memory of its own that it holds now; None if the system doesn't say."""
        try:
            status = Path(f"/proc/{self._process.id}/status").read_text()
        except OSError:
            return None
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        return None if found is None else int(found[1]) * 1024

    def close(self) -> None:
        self._process.close()
