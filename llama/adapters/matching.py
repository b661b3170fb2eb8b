"""peft's rules for which modules a name or pattern of an `adapter_config.json` means.

Patterns come from strangers, and one can keep Python's `re` busy for years: those that aren't plain names run in a
process of their own, with a limit. Knows names; knows no tensors and no values of the configuration.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LlamaError, shorten

SECONDS, MEGABYTES = 1, 512  # of computing time and memory, for all patterns of a key
MOST_SECONDS = 60  # on the clock, on a machine that is busy
LAYER_NUMBER = r".*?\.[^.]*\.(?P<number>\d+)\."  # peft's, where the configuration has no `layers_pattern`
# Reads the names and the (method of re, pattern) of each job; prints a line for each pattern: the names that it
# matches, each with the text of its group `number`.
PROGRAM = """
import json, re, sys
names, jobs, seconds, megabytes = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
except (ImportError, OSError, ValueError):
    pass
for method, pattern in jobs:
    try:
        match = getattr(re.compile(pattern), method)
        found = {name: one for name in names if (one := match(name))}
        print(json.dumps({name: one.groupdict().get("number") for name, one in found.items()}), flush=True)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        print(json.dumps(str(error) or type(error).__name__), flush=True)
"""


@dataclass
class Matcher:
    """The names of a model's modules, and the patterns of one file that were matched with them."""

    path: Path  # the file that has the patterns, for messages
    names: Sequence[str]  # of modules, as transformers calls them
    known: dict[tuple[str, str], dict[str, str | None]] = field(default_factory=dict)  # what jobs have given

    def run(self, key: str, jobs: Iterable[tuple[str, str]]) -> list[dict[str, str | None]]:
        """For each (method of re, pattern): the names that it matches, each with the text of its group `number`.

        key: of the configuration, for messages. Raises LlamaError for what is no pattern, and for one that takes too
        long.
        """
        jobs = list(jobs)
        new = [job for job in dict.fromkeys(jobs) if job not in self.known]
        if new:
            lines = run_program([list(self.names), new, SECONDS, MEGABYTES])
            for job, line in zip(new, [*lines, None], strict=False):
                found = None if line is None else json.loads(line)
                if not isinstance(found, dict):
                    wrong = f"it takes over {SECONDS} s" if found is None else f"{found}"
                    raise LlamaError(
                        f"{self.path}: {key} has {shorten(job[1])}, which can't be matched with the names of the "
                        f"layers ({wrong}): expected names, or a regular expression of Python's"
                    )
                self.known[job] = found
        return [self.known[job] for job in jobs]

    def matching_fully(self, key: str, pattern: str) -> set[str]:
        """The names that the whole pattern matches."""
        return set(self.run(key, [("fullmatch", pattern)])[0])

    def ending_with(self, names: Iterable[str]) -> set[str]:
        """The modules of one of these names, or whose name ends with one at a dot."""
        ends = tuple(f".{name}" for name in names)
        return {name for name in self.names if f".{name}".endswith(ends)}

    def inside(self, key: str, modules: Iterable[str]) -> set[str]:
        """The modules that are one of `modules`, by any part of their names, or lie in it."""
        plain = [module for module in modules if is_plain(module)]
        found = {name for name in self.names if any(f".{module}." in f".{name}." for module in plain)}
        jobs = [("match", rf"(^|.*\.){module}($|\..*)") for module in modules if not is_plain(module)]
        return found.union(*self.run(key, jobs)) if jobs else found

    def first_pattern(self, key: str, patterns: Iterable[str]) -> dict[str, str]:
        """The first pattern that is a module's name, or the end of it at a dot, by module; modules without one lack."""
        patterns = list(patterns)
        jobs = {pattern: ("match", rf"(.*\.)?({pattern})$") for pattern in patterns if not is_plain(pattern)}
        results = dict(zip(jobs, self.run(key, jobs.values()), strict=True)) if jobs else {}
        chosen: dict[str, str] = {}
        for pattern in patterns:
            if pattern in results:
                names = set(results[pattern])
            else:
                whole = pattern.removeprefix("^")
                names = {whole} if whole != pattern else self.ending_with([pattern])
            for name in names.intersection(self.names):
                chosen.setdefault(name, pattern)
        return chosen

    def layer_numbers(self, key: str, patterns: Sequence[str]) -> dict[str, int]:
        """The number of the layer of each module that is in one. patterns: what may stand before the number."""
        if not patterns:
            matches = [{name: one["number"] for name in self.names if (one := re.match(LAYER_NUMBER, name))}]
        else:
            matches = self.run(key, [("match", rf"(?:^|.*?\.){p}\.(?P<number>\d+)\.") for p in patterns])
        numbers: dict[str, int] = {}
        for match in matches:
            for name, number in match.items():
                if number is not None:
                    numbers.setdefault(name, int(number))
        return numbers


def is_plain(pattern: str) -> bool:
    """Whether it is a name, or the end of one, or with ^ the whole name."""
    return re.fullmatch(r"\^?\w+(\.\w+)*", pattern) is not None


def run_program(request: list[object]) -> list[str]:
    """The lines that PROGRAM prints for a request, until it is done or has taken too long."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        output, _ = process.communicate(json.dumps(request), MOST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    with contextlib.suppress(ValueError):
        return output[: output.rindex("\n")].split("\n")
    return []
