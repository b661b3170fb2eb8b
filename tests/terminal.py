"""A program at a pseudo-terminal, for tests: type keys, wait for what it shows."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

from tiny import ROOT, environment, launched


class Terminal:
    """80 columns wide. env: over what the tests' own environment has."""

    def __init__(self, *command: str, ranks: int = 0, **env: str):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
        self.process = subprocess.Popen(
            launched(*command, ranks=ranks),
            cwd=ROOT,
            env={**environment(), "TERM": "xterm", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """All that is shown up to the first match of `pattern` in what was not waited for yet."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < end, f"waited in vain for {pattern!r}, saw {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def echoes(self) -> bool:
        """Whether the terminal is as a shell expects it: whole lines, shown as they are typed, with signals."""
        wanted = termios.ECHO | termios.ICANON | termios.ISIG
        return termios.tcgetattr(self.master)[3] & wanted == wanted

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal() -> None:
    """The child's session gets the terminal, so that the terminal's Ctrl-C reaches the child as it would a user's."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def home(directory: Path) -> Path:
    """A home of its own for a program, with the compiled kernels that are there already."""
    cache = directory / ".cache" / "llama"
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(Path.home() / ".cache" / "llama" / "kernels")
    return directory
