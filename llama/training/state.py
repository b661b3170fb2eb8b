"""What of a training survives a kill: the state of every rank after some step, on disk whole or not at all.

Knows steps and files; knows no model. A directory's `training.json` names the step whose files count; it is written
after them, and those of earlier steps go last.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import get_data_parallel_rank, get_model_parallel_rank

from .. import parallel
from .._util.files import PARTIAL, read_json, write_json, write_whole
from .._util.validate import is_integer
from ..errors import LlamaError, shorten, to_one_line

NAME = "training.json"
BEGIN_ANEW = "name another --output, or start with --force to begin anew"


@dataclass
class Progress:
    """step: how many are done. losses: of each. history: what was measured, by step. best: the measure to be beaten.

    waited: how often it wasn't beaten since. ended: nothing is left to do. begun: when, which is today for templates
    that write the date.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    waited: int = 0
    ended: bool = False
    begun: str = field(default_factory=lambda: datetime.now().isoformat())


class Keeper:
    """The progress of one training in its directory. about: what makes it this training and no other."""

    def __init__(self, directory: Path, about: dict[str, Any], force: bool):
        """Called on all ranks; writes nothing. Raises LlamaError for a directory that holds something else."""
        self.directory, self.about = directory, about
        with parallel.raise_together():
            found = self._found(force) if parallel.is_main_process() else Progress()
        self.progress = parallel.broadcast_object(found)

    def _found(self, force: bool) -> Progress:
        path = self.directory / NAME
        if force:
            return Progress()
        if path.is_file():
            return self._read(path)
        # A run that was killed while it wrote its first progress leaves a file that isn't called so yet.
        unfinished = NAME + PARTIAL
        if self.directory.is_dir() and all(one.name.startswith(unfinished) for one in self.directory.iterdir()):
            return Progress()
        if self.directory.exists() or self.directory.is_symlink():
            raise LlamaError(f"{self.directory} is there and holds something else: {BEGIN_ANEW}")
        return Progress()

    def _read(self, path: Path) -> Progress:
        try:
            found = read_json(path, "a training's progress")
            about, progress = dict(found["about"]), Progress(**found["progress"])
            if not is_integer(progress.step, 0) or not isinstance(progress.history, list):
                raise ValueError("its steps aren't counted")
            datetime.fromisoformat(progress.begun)
        except (KeyError, TypeError, ValueError) as e:
            raise LlamaError(f"{path} is no training's progress ({to_one_line(e)}): {BEGIN_ANEW}") from None
        for name, value in self.about.items():
            if about.get(name) != value:
                different = f"{name} was {shorten(about.get(name))} and is {shorten(value)}"
                raise LlamaError(f"{path} is of another training ({different}): {BEGIN_ANEW}")
        return progress

    def begin(self) -> None:
        """Make the directory this training's, unless it is; what is left there of others isn't read any more.

        Called on all ranks. Raises LlamaError where nothing can be written.
        """
        if self.progress.step > 0:
            return
        with parallel.raise_together():
            if parallel.is_main_process():
                try:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    for name in ("config.json", "adapter/adapter_config.json"):
                        (self.directory / name).unlink(missing_ok=True)
                except OSError as e:
                    raise LlamaError(f"{self.directory} can't be written ({e.strerror})") from e
        self.note()

    def _path(self, step: int) -> Path:
        return self.directory / f"state-{step}-{get_model_parallel_rank()}.pt"

    def restore(self, into: Callable[[dict[str, Any]], None]) -> None:
        """Give away what this rank had kept after `progress.step`, on the CPU. Raises LlamaError on all ranks."""
        path = self._path(self.progress.step)
        with parallel.raise_together():
            try:
                into(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as e:
                raise LlamaError(f"{path} can't be read ({to_one_line(e)}): {BEGIN_ANEW}") from e

    def keep(self, state: dict[str, Any]) -> None:
        """Let a later run go on from here. Of data-parallel copies the first writes. Called on all ranks."""
        with parallel.raise_together():
            if get_data_parallel_rank() == 0:
                path = self._path(self.progress.step)
                try:
                    write_whole(path, lambda f: torch.save(state, f))
                except (OSError, RuntimeError) as e:  # torch's words for a disk that is full
                    raise LlamaError(f"{path} can't be written ({to_one_line(e)})") from e
        self.note()

    def note(self) -> None:
        """Write `progress`, then drop the states that it doesn't name any more, and files that a kill left unfinished.

        Called on all ranks.
        """
        with parallel.raise_together():
            if parallel.is_main_process():
                write_json(self.directory / NAME, {"about": self.about, "progress": vars(self.progress)})
                own = () if self.progress.ended else self.directory.glob(f"state-{self.progress.step}-*.pt")
                left = ("state-*.pt", f"?*{PARTIAL}*")
                for old in {one for name in left for one in self.directory.glob(name)} - {*own}:
                    old.unlink()
