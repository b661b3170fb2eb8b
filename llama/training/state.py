"""A training that survives a kill: its progress, and the state of every rank, on disk whole or not at all.

Knows steps and files; knows no model. A directory's `training.json` names the step whose state files count. It is
written after them, and the state files of earlier steps are deleted after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import get_data_parallel_rank, get_model_parallel_rank

from .. import parallel
from .._util.files import PARTIAL, check_file, read_json, refuse_unwritable, write_json, write_whole
from .._util.resumable import BEGIN_ANEW, check_same_job, refuse_damaged
from .._util.validate import is_integer
from ..errors import LlamaError, to_one_line

NAME = "training.json"


@dataclass
class Progress:
    """How far a training has got."""

    step: int = 0  # steps that are done
    losses: list[float] = field(default_factory=list)  # of each step
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation: step, epoch, metrics by name
    best: float | None = None  # the deciding metric of the best evaluation; the larger the better
    waited: int = 0  # evaluations since the best one
    ended: bool = False  # nothing is left to do
    # When it was begun: today's date for chat templates that write it, so that resumed runs see the same examples.
    begun: str = field(default_factory=lambda: datetime.now().isoformat())


class ResumableTraining:
    """The files of one training in its directory."""

    directory: Path
    job: dict[str, Any]  # the description of the training; a run with another one may not resume it
    progress: Progress  # as of the last `save`, or further, since the training updates it

    def __init__(self, directory: Path, job: dict[str, Any], force: bool):
        """Called on all ranks; writes nothing. Raises LlamaError for a directory that holds something else."""
        self.directory, self.job = directory, job
        with parallel.raise_together():
            progress = self._find_progress(force) if parallel.is_main_process() else Progress()
        self.progress = parallel.broadcast_object(progress)

    def _find_progress(self, force: bool) -> Progress:
        path = self.directory / NAME
        if force:
            return Progress()
        if path.exists():
            return self._read_progress(path)
        # A run that was killed while it wrote its first progress leaves only that file's temporary form.
        temporary = NAME + PARTIAL
        if self.directory.is_dir() and all(file.name.startswith(temporary) for file in self.directory.iterdir()):
            return Progress()
        if self.directory.exists() or self.directory.is_symlink():
            raise LlamaError(f"{self.directory} is there and holds something else: {BEGIN_ANEW}")
        return Progress()

    def _read_progress(self, path: Path) -> Progress:
        with refuse_damaged(path, "a training's progress"):
            content = read_json(path, "a training's progress")
            recorded_job, progress = dict(content["about"]), Progress(**content["progress"])
            if not is_integer(progress.step, 0) or not isinstance(progress.history, list):
                raise ValueError("its step isn't a count, or its history isn't a list")
            datetime.fromisoformat(progress.begun)
        check_same_job(path, recorded_job, self.job)
        return progress

    def begin(self) -> None:
        """Make the directory, unless steps are done; delete the files by which another run's model would be read.

        Called on all ranks. Raises LlamaError where nothing can be written.
        """
        if self.progress.step > 0:
            return
        with parallel.raise_together():
            if parallel.is_main_process():
                with refuse_unwritable(self.directory):
                    self.directory.mkdir(parents=True, exist_ok=True)
                    for name in ("config.json", "adapter/adapter_config.json"):
                        (self.directory / name).unlink(missing_ok=True)
        self._write_progress()

    def _state_path(self, step: int) -> Path:
        return self.directory / f"state-{step}-{get_model_parallel_rank()}.pt"

    def restore(self, load_state: Callable[[dict[str, Any]], None]) -> None:
        """Pass this rank's state after `progress.step`, on the CPU, to `load_state`. Raises LlamaError on all ranks."""
        path = self._state_path(self.progress.step)
        with parallel.raise_together():
            check_file(path)
            try:
                load_state(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as e:
                raise LlamaError(f"{path} can't be read ({to_one_line(e)}): {BEGIN_ANEW}") from e

    def save(self, state: dict[str, Any]) -> None:
        """Write this rank's state and the progress. Of data-parallel copies the first writes. Called on all ranks."""
        with parallel.raise_together():
            if get_data_parallel_rank() == 0:
                path = self._state_path(self.progress.step)
                with refuse_unwritable(path):
                    write_whole(path, lambda f: torch.save(state, f))
        self._write_progress()

    def _write_progress(self) -> None:
        """Write `progress`, then delete the states that it doesn't name, and files that a kill left unfinished.

        Called on all ranks.
        """
        with parallel.raise_together():
            if parallel.is_main_process():
                write_json(self.directory / NAME, {"about": self.job, "progress": vars(self.progress)})
                kept = () if self.progress.ended else self.directory.glob(f"state-{self.progress.step}-*.pt")
                states, unfinished = self.directory.glob("state-*.pt"), self.directory.glob(f"?*{PARTIAL}*")
                for path in {*states, *unfinished} - {*kept}:
                    path.unlink()
