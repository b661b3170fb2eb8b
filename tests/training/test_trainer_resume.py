"""A training that was killed goes on to the same files, and one that can't go on says why."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from finetune_program import finetune_until_done
from json_lines import write
from rank_pool import RankPool
from tiny_training import DATA, bytes_in, history, names_in

from llama import LlamaError
from llama.adapters.lora import Lora
from llama.training import trainer as training
from llama.training.trainer import Training, TrainingConfig, finetune

ckpt, files, no_picture = tiny_training.ckpt, tiny_training.files, tiny_training.no_picture


@pytest.mark.slow
def test_killed_at_any_moment_it_comes_to_the_same(pool: RankPool, ckpt: Path, files: dict, tmp_path: Path) -> None:
    """With the dropout of a new head and of an adapter."""
    evaluated = {"epochs": 3, "batch_size": 3, "learning_rate": 5e-3, "every": 2}
    configs = {
        "tag": {**evaluated, "task": "tag", "data": files["tag"], "eval": files["tag"]},
        "adapter": {**evaluated, "task": "language", "data": files["language"], "eval": files["language"]},
        "classify": {**evaluated, "task": "classify", "data": files["classify"], "every": 3},
    }
    configs["adapter"] |= {"lora": {"r": 2, "alpha": 4, "dropout": 0.3}}
    seeds = (None, 1, 2)
    jobs = [
        {"config": {**config, "output": str(tmp_path / f"{name} {seed}")}, "ckpt_dir": str(ckpt)}
        | {"model_parallel_size": 1, "kills": seed and f"{name} {seed}"}
        for name, config in configs.items()
        for seed in seeds
    ]
    kills = [pool.run(finetune_until_done, job).results[0] for job in jobs]
    assert kills[:: len(seeds)] == [0] * len(configs) and sum(kills) > 8, kills
    for name in configs:
        whole = tmp_path / f"{name} None"
        for killed in (tmp_path / f"{name} {seed}" for seed in seeds[1:]):
            assert history(killed) == history(whole)
            assert bytes_in(killed) == bytes_in(whole)
            assert names_in(killed) == names_in(whole), "and nothing is left lying about"


class Killed(BaseException):
    """Ends a training as a kill does: no code catches it."""


def dying(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training end at the beginning of this step."""
    once = Training.step

    def step_or_die(self: Training) -> float:
        if self.progress.step == step:
            raise Killed
        return once(self)

    monkeypatch.setattr(Training, "step", step_or_die)


@pytest.fixture
def begun(ckpt: Path, files: dict, tmp_path: Path) -> Callable[..., Any]:
    """Begins or resumes a training."""

    def begin(force: bool = False, dtype: str = "float32", where: Path = ckpt, **changed: Any) -> Path:
        config = {
            "task": "classify",
            "data": files["classify"],
            "output": str(tmp_path / "out"),
            "epochs": 3,
            "every": 1,
        }
        finetune(
            TrainingConfig(**{**config, "batch_size": 3, **changed}), where, device="cpu", dtype=dtype, force=force
        )
        return tmp_path / "out"

    return begin


@pytest.fixture
def killed(begun: Callable[..., Any], tmp_path: Path) -> Path:
    """A training that was killed in its fifth step."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        dying(patched, 4)
        begun()
    assert {"state-4-0.pt", "training.json"} <= names_in(tmp_path / "out")
    return tmp_path / "out"


def test_a_training_of_something_else_is_refused(
    killed: Path, begun: Callable[..., Any], files: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = bytes_in(killed)
    other = write(tmp_path / "other.jsonl", DATA["classify"][1:])
    for changed, message in (
        ({"learning_rate": 1e-3}, r"training.json was begun with another learning_rate \(0.0001, now 0.001\)"),
        ({"data": str(other)}, r"begun with another records \('[0-9a-f]+"),
        ({"task": "language", "data": files["language"]}, r"another task \('classify', now 'language'\)"),
        ({"lora": Lora(2, 4)}, r"another lora \('None', now .Lora"),
        ({"dtype": "bfloat16"}, r"another dtype \('torch.float32', now 'torch.bfloat16'\)"),
        ({"seed": 2}, r"another seed \(1, now 2\)"),
    ):
        with pytest.raises(
            LlamaError,
            match=rf"{message}.*: use the same .*, name another output \(--output\), or begin anew with --force",
        ) as caught:
            begun(**changed)
        assert "\n" not in str(caught.value)
    assert bytes_in(killed) == before
    capsys.readouterr()
    begun(lora=Lora(2, 4), merge=False, force=True)
    assert "going on" not in capsys.readouterr().out
    assert names_in(killed) & {"model.safetensors", "adapter", "state-4-0.pt"} == {"adapter"}
    assert [one["step"] for one in history(killed)] == [*range(1, 10)]


def test_what_was_killed_goes_on_and_ends_once(
    killed: Path, begun: Callable[..., Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    begun()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{killed}: going on after step 4" and len(said) == 1 + 5 + 1
    before, told = bytes_in(killed), history(killed)
    monkeypatch.setattr(training.TaskModel, "build", None)
    begun()
    assert capsys.readouterr().out == f"{killed}: all is done already\n"
    assert (bytes_in(killed), history(killed)) == (before, told)


def test_the_day_on_which_it_began_is_today(
    killed: Path, begun: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat templates may write the date, and a resumed run must see the same examples."""
    noted = json.loads((killed / "training.json").read_text())
    noted["progress"]["begun"] = "2001-02-03T04:05:06"
    (killed / "training.json").write_text(json.dumps(noted))
    days: list[datetime] = []
    make_formatter = training.make_formatter
    monkeypatch.setattr(training, "make_formatter", lambda *given: (days.append(given[-1]), make_formatter(*given))[1])
    begun()
    begun(output=str(killed.parent / "new"), epochs=1)
    assert days[0] == datetime(2001, 2, 3, 4, 5, 6) and datetime.now() - days[1] < timedelta(minutes=5)


@pytest.mark.parametrize("spoil", ["cut", "garbage", "empty", "missing", "other"])
def test_a_spoiled_state_is_named(killed: Path, begun: Callable[..., Any], spoil: str) -> None:
    path = killed / "state-4-0.pt"
    whole = path.read_bytes()
    if spoil == "other":
        torch.save({"parameters": {}}, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"x" * 999}.get(spoil, b""))
    if spoil == "missing":
        path.unlink()
    with pytest.raises(
        LlamaError,
        match=r"state-4-0.pt can't be read \(.*\): name another output \(--output\), or .*--force \(force=True\)",
    ):
        begun()
    begun(force=True)
    assert len(history(killed)) == 9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"about": 5, "progress": {}}',
        b'{"about": {}, "progress": {"step": -1}}',
        b'{"about": {}, "progress": {"step": "4"}}',
        b'{"about": {}, "progress": {"history": 5}}',
        b'{"about": {}, "progress": {"begun": "today"}}',
        b'{"about": {}, "progress": {"stop": 5}}',
        b'{"about": {}, "progress": [4]}',
    ],
)
def test_a_spoiled_progress_is_named(begun: Callable[..., Any], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_bytes(content)
    with pytest.raises(
        LlamaError, match=r"training.json is damaged, or isn't a training's progress \(.*begin anew with --force"
    ) as caught:
        begun()
    assert "\n" not in str(caught.value)


def test_directories_that_hold_something_else(begun: Callable[..., Any], tmp_path: Path, ckpt: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(LlamaError, match=r"out is there and holds something else: .*--force"):
        begun()
    with pytest.raises(LlamaError, match=r"notes.txt is there and holds something else"):
        begun(output=str(tmp_path / "out" / "notes.txt"))
    for inside, wrong in ((ckpt, "is the source itself"), (ckpt / "trained", "lie in each other")):
        before = names_in(ckpt)
        with pytest.raises(LlamaError, match=f"{wrong}.*: choose another directory"):
            begun(output=str(inside), force=True)
        assert names_in(ckpt) == before
    with pytest.raises(LlamaError, match="can't be written"):
        begun(output=str(tmp_path / "out" / "notes.txt" / "deeper"))
    begun(force=True, epochs=1)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    begun(output=str(tmp_path / "empty"), epochs=1)
    assert "model.safetensors" in names_in(tmp_path / "empty")
