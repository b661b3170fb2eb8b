"""Functions of tests on several ranks, without the seconds that each start of Python and torch takes.

A test asks the fixture `pool` of tests/conftest.py; tests/rank_server.py does the work. For functions alone: what is
about torchrun, signals, exit codes or command lines starts a program with `tiny.run_program`.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import ROOT, environment

SERVER = Path(__file__).with_name("rank_server.py")


@dataclass(frozen=True)
class Outcome:
    results: list[Any]  # what the function returned, by rank
    stdout: str  # of all ranks
    stderr: str


class RankPool:
    """Starts its server at the first call, and again after a call that it did not survive."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int = 0, timeout: float = 120) -> Outcome:
        """Call a function of a module that other processes can import, as under torchrun; 0 ranks: without it.

        Raises AssertionError with what the ranks wrote if one of them raises, or is not done in time.
        """
        if self.server is None or self.server.poll() is not None:
            self.server = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=environment(),
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        pickle.dump((function.__module__, function.__qualname__, arguments, ranks, timeout), self.server.stdin)
        self.server.stdin.flush()
        said = pickle.load(self.server.stdout)
        assert not said["wrong"], f"{said['wrong']}\n{said['stdout']}{said['stderr']}"
        return Outcome([pickle.loads(result) for result in said["results"]], said["stdout"], said["stderr"])

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()  # closes its input: it ends
