"""What of a training survives a kill: the state of every rank after some step, on disk whole or not at all.

Knows steps and files; knows no model. A directory's `training.json` names the step whose files count; it is written
after them, and those of earlier steps go last.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import get_data_parallel_rank, get_model_parallel_rank

from . import parallel
from .errors import LlamaError, one_line, shortened
from .files import read_json, write_json, write_whole

NAME = "training.json"
BEGIN_ANEW = "name another --output, or start with --force to begin anew"


@dataclass
class Progress:
    """step: how many are done. losses: of each. history: what was measured, by step. best: the measure to be beaten.

    waited: how often it wasn't beaten since. ended: nothing is left to do.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    waited: int = 0
    ended: bool = False


class Keeper:
    """The progress of one training in its directory. about: what makes it this training and no other."""

    def __init__(self, directory: Path, about: dict[str, Any], force: bool):
        """Called on all ranks. Raises LlamaError for a directory that holds something else."""
        self.directory, self.about = directory, about
        with parallel.together():
            begun = self._begun(force) if parallel.is_printer() else Progress()
        self.progress = parallel.broadcast_object(begun)

    def _begun(self, force: bool) -> Progress:
        path = self.directory / NAME
        if not force and path.is_file():
            found = read_json(path, "a training's progress")
            different = [name for name, value in self.about.items() if found.get("about", {}).get(name) != value]
            if different:
                name = different[0]
                earlier = shortened(found.get("about", {}).get(name))
                raise LlamaError(
                    f"{path} is of another training ({name} was {earlier} and is {shortened(self.about[name])}): "
                    f"{BEGIN_ANEW}"
                )
            try:
                return Progress(**found["progress"])
            except (KeyError, TypeError) as e:
                raise LlamaError(f"{path} is no training's progress ({one_line(e)}): {BEGIN_ANEW}") from None
        if not force and self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise LlamaError(f"{self.directory} is there and holds something else: {BEGIN_ANEW}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for old in (path, *self.directory.glob("state-*.pt")):
                old.unlink(missing_ok=True)
        except OSError as e:
            raise LlamaError(f"{self.directory} can't be written ({e.strerror})") from e
        return Progress()

    def _path(self, step: int) -> Path:
        return self.directory / f"state-{step}-{get_model_parallel_rank()}.pt"

    def state(self) -> dict[str, Any] | None:
        """What this rank had kept after `progress.step`, on the CPU; None at the beginning. Raises on all ranks."""
        if self.progress.step == 0:
            return None
        path = self._path(self.progress.step)
        with parallel.together():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:
                raise LlamaError(f"{path} can't be read ({one_line(e)}): {BEGIN_ANEW}") from e

    def keep(self, state: dict[str, Any]) -> None:
        """Let a later run go on from here. Of data-parallel copies the first writes. Called on all ranks."""
        with parallel.together():
            if get_data_parallel_rank() == 0:
                write_whole(self._path(self.progress.step), lambda f: torch.save(state, f))
        self.note()

    def note(self) -> None:
        """Write `progress`, then drop the states that it doesn't name any more. Called on all ranks."""
        with parallel.together():
            if parallel.is_printer():
                write_json(self.directory / NAME, {"about": self.about, "progress": vars(self.progress)})
                for old in self.directory.glob("state-*.pt"):
                    if self.progress.ended or old.name.split("-")[1] != str(self.progress.step):
                        old.unlink()
