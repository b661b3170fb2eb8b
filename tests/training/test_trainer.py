"""Fine-tuning of tiny random models.

The oracle of the steps is a plain loop with transformers and torch; that of a run that was killed, a run that wasn't;
that of many ranks, a single process.
"""

import argparse
import json
import math
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from finetune_program import finetune_all, finetune_until_done
from rank_pool import RankPool
from safetensors.torch import load_file
from test_dataset import GOOD, write
from test_heads import ENDINGS, make
from tiny import ROOT, environment, launched, run_program, write_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama import LlamaError, TaskModel
from llama.adapters.lora import TARGETS, Lora
from llama.cli import finetune as finetune_command
from llama.training import trainer as training
from llama.training.preprocessing import Example
from llama.training.trainer import Training, TrainingConfig, finetune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CPU = {"device": "cpu", "dtype": "float32"}
ALL_LINEAR = [name for name in TARGETS if name != "output"]
CITIES = ["Rome", "São Tomé", "Ulm", "東京"]


def tagged(i: int) -> dict[str, Any]:
    text = f"{'so ' * (i % 3)}in {CITIES[i % 4]} now"
    start = text.index(CITIES[i % 4])
    return {"text": text, "spans": [{"start": start, "end": start + len(CITIES[i % 4]), "label": "place"}] * (i != 4)}


def asked(i: int) -> dict[str, Any]:
    context = f"{'so ' * (i % 3)}it is {CITIES[i % 4]} here"
    answers = [{"text": CITIES[i % 4], "start": context.index(CITIES[i % 4])}] * (i != 4)
    return {"question": "where" + "?" * (i % 2), "context": context, "answers": answers}


# Of different lengths, and of different numbers of tokens to be learnt; seven, so that the last batch isn't full.
DATA: dict[str, list[dict[str, Any]]] = {
    "language": [
        *({"text": "abc " * i} for i in (1, 4, 2)),
        *({"prompt": "x" * i, "completion": "yes " * i} for i in (1, 3)),
        *GOOD["language"][-2:],
    ],
    "classify": [{"text": "ab"[i % 2] * (i + 1), "label": "ab"[i % 2]} for i in range(7)],
    "tag": [tagged(i) for i in range(7)],
    "answer": [asked(i) for i in range(7)],
}
LABELS = {"classify": ["a", "b"], "tag": ["O", "B-place", "I-place"]}


def base(directory: Path, task: str = "language", **more: Any) -> transformers.PreTrainedModel:
    """transformers' model of a task, saved with a tokenizer of bytes."""
    config: dict[str, Any] = {**SIZES, "id2label": dict(enumerate(LABELS.get(task, ["a", "b"]))), **more}
    if task == "classify":
        config |= {"problem_type": "single_label_classification"}
    model = make("llama", task, **config)
    model.save_pretrained(directory)
    write_tokenizer(directory / "tokenizer.model")
    return model


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model."""
    directory = tmp_path_factory.mktemp("finetune") / "ckpt"
    base(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The records of each task."""
    root = tmp_path_factory.mktemp("records")
    return {task: str(write(root / f"{task}.jsonl", lines)) for task, lines in DATA.items()}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time. The programs that tests start do draw it."""
    monkeypatch.setattr(training, "draw_curves", lambda losses, history, path: path.write_bytes(b"%d" % len(history)))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Example]]:
    """The batches of all steps from here on."""
    seen: list[list[Example]] = []
    batch = Training.select_batch

    def recorded(self: Training, step: int) -> list[Example]:
        seen.append([*batch(self, step)])
        return [*seen[-1]]

    monkeypatch.setattr(Training, "select_batch", recorded)
    return seen


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "training.json").read_text())["progress"]["history"]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Equal to within a share of the range of each tensor's numbers.

    The bias of starts and ends is left out: softmax ignores it, so its gradient is rounding, of which Adam makes steps.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("qa_outputs.bias"):
            continue
        span = float(tensor.amax() - tensor.amin())
        assert float((actual[name] - tensor).abs().amax()) <= share * span + 1e-7, name


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Equal to within a share of the norm. Single numbers may differ more, where Adam divides rounding by rounding."""
    assert_near(actual, expected, 1e-3)
    off = torch.stack([(actual[name] - tensor).norm() for name, tensor in expected.items()]).norm()
    assert float(off) <= share * float(torch.stack([tensor.norm() for tensor in expected.values()]).norm())


# --- one step after another -------------------------------------------------------------------------------------------


def padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def plain_loss(model: transformers.PreTrainedModel, batch: list[Example], task: str) -> Tensor:
    """The loss of transformers' own class; for answers without padding in the softmax, as in this project."""
    tokens, targets = padded([one.tokens for one in batch], 511), [one.target for one in batch]
    mask = padded([[1] * len(one.tokens) for one in batch], 0)
    if task == "answer":
        out = model(input_ids=tokens, attention_mask=mask)
        places = torch.tensor(targets).unbind(-1)
        both = [x.masked_fill(mask == 0, -torch.inf) for x in (out.start_logits, out.end_logits)]
        return sum(F.cross_entropy(x, y) for x, y in zip(both, places, strict=True)) / 2
    labels = torch.tensor(targets) if task == "classify" else padded(targets, -100)
    return model(input_ids=tokens, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("task", DATA)
def test_steps_are_those_of_a_plain_loop(task: Any, files: dict, batches: list, tmp_path: Path) -> None:
    theirs = base(tmp_path / "ckpt", task)
    rates = {"learning_rate": 4e-3, "warmup": 1 / 3, "weight_decay": 0.1, "clip": 0.5}
    sizes = {"epochs": 3, "batch_size": 4, "micro_batch_size": 3, "max_seq_len": 64}
    finetune(TrainingConfig(task, files[task], str(tmp_path / "out"), **rates, **sizes), tmp_path / "ckpt", **CPU)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False)
    losses, norms = [], []
    for batch, share in zip(batches, [0.5, 1, 0.8, 0.6, 0.4, 0.2], strict=True):
        optimizer.zero_grad()
        loss = plain_loss(theirs, batch, task)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * share
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(norms) > 0.5, "clipping did something"
    told = history(tmp_path / "out")
    assert [one["trained"] for one in told] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)], rel=1e-4)
    assert [(one["step"], one["epoch"]) for one in told] == [(2, 1), (4, 2), (6, 3)]
    assert_near(weights(tmp_path / "out"), dict(theirs.state_dict()), 1e-4)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(
    ckpt: Path, files: dict, batches: list, tmp_path: Path
) -> None:
    finetune(TrainingConfig("classify", files["classify"], str(tmp_path / "out"), epochs=3, batch_size=3), ckpt, **CPU)
    epochs = [[one for batch in batches[i : i + 3] for one in batch] for i in (0, 3, 6)]
    assert [len(batch) for batch in batches] == [3, 3, 1] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for epoch in epochs:
        assert sorted(tuple(one.tokens) for one in epoch) == sorted({tuple(one.tokens) for one in epochs[0]})
        assert len({tuple(one.tokens) for one in epoch}) == 7


@pytest.mark.parametrize("task", ["language", "tag"])
def test_batches_in_parts_and_layers_twice_are_the_same(task: Any, files: dict, tmp_path: Path) -> None:
    """Also with examples that have different numbers of tokens to learn."""
    base(tmp_path / "ckpt", task)

    def trained(name: str, **options: Any) -> dict[str, Tensor]:
        config = TrainingConfig(
            task, files[task], str(tmp_path / name), epochs=2, learning_rate=3e-3, every=9, **options
        )
        finetune(config, tmp_path / "ckpt", **CPU)
        return weights(tmp_path / name)

    whole = trained("whole")
    for size in (1, 2):
        assert_same(trained(f"{size}", micro_batch_size=size), whole, 1e-5)
    recomputed = trained("recomputed", recompute=True)
    assert all(torch.equal(recomputed[name], whole[name]) for name in whole)


# --- on ranks ---------------------------------------------------------------------------------------------------------

RANKED: dict[str, dict[str, Any]] = {
    "language": {"micro_batch_size": 2},
    "tag": {"lora": {"r": 4, "alpha": 8, "targets": ALL_LINEAR}, "learning_rate": 1e-2},
    "answer": {"lora": {"r": 2, "alpha": 4}, "learning_rate": 1e-2, "micro_batch_size": 1},
}


def rank_jobs(root: Path, files: dict[str, str], output: Path, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Jobs without dropout: the heads of their checkpoints have none."""
    shared = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3, "every": 9, "max_seq_len": 64}
    return [
        {
            "config": {**shared, **more, "task": task, "data": files[task], "output": str(output / f"{task} {size}")},
            "ckpt_dir": str(root / task),
            "model_parallel_size": size,
        }
        for size in sizes
        for task, more in RANKED.items()
    ]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    for task in DATA:
        base(root / task, task)
    return root


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spoiled")
    write(root / "tag.jsonl", [*DATA["tag"], b"", {"text": "a", "spans": [{"start": 0, "end": 9, "label": "x"}]}])
    write(root / "classify.jsonl", [*DATA["classify"], {"text": "x" * 80, "label": "a"}])
    return root


def failing_jobs(root: Path, files: dict[str, str], spoiled: Path, output: Path) -> list[dict[str, Any]]:
    """Jobs that fail: by a line that is no record, by a line that is too long, by numbers that overflow."""
    data = {
        "tag": str(spoiled / "tag.jsonl"),
        "classify": str(spoiled / "classify.jsonl"),
        "language": files["language"],
    }
    return [
        {
            "config": {
                **{"task": task, "data": path, "output": str(output / f"failed {task} {size}"), "max_seq_len": 64},
                **({"learning_rate": 1e30} if task == "language" else {}),
            },
            "ckpt_dir": str(root / task),
            "model_parallel_size": size,
        }
        for size in (2, 1)
        for task, path in data.items()
    ]


@dataclass(frozen=True)
class Ranks:
    """The outputs of two and of four ranks, and each rank's report of each job."""

    output: Path
    two: list[list[dict[str, Any]]]
    four: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(
    pool: RankPool, ckpt: Path, heads: Path, files: dict, spoiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """Jobs that one rank does too, jobs that fail, and a job that isn't killed."""
    output = tmp_path_factory.mktemp("ranks")
    whole = {"task": "tag", "data": files["tag"], "eval": files["tag"], "output": str(output / "whole"), "every": 1}
    whole |= {"epochs": 3, "batch_size": 4, "max_seq_len": 64, "learning_rate": 1e-2}
    jobs = rank_jobs(heads, files, output / "two", (2, 1)) + failing_jobs(heads, files, spoiled, output)
    jobs.append({"config": whole, "ckpt_dir": str(ckpt), "model_parallel_size": None})
    two = pool.run(finetune_all, jobs, ranks=2).results
    four = pool.run(finetune_all, rank_jobs(heads, files, output / "four", (4, 2)), ranks=4).results
    return Ranks(output, two, four)


def check_same(reports: list[list[dict[str, Any]]], output: Path, alone: Path, sizes: tuple[int, ...]) -> None:
    for report in reports:
        for one in report[: len(sizes) * len(RANKED)]:
            assert (one["error"], one["steps"]) == (None, 4)
    for task in RANKED:
        one = alone / f"{task} 1"
        for many in (output / f"{task} {size}" for size in sizes):
            assert_near(weights(many), weights(one), 1e-4)
            assert history(many)[0]["trained"] == pytest.approx(history(one)[0]["trained"], rel=1e-4)
            if "lora" in RANKED[task]:
                assert_near(*(load_file(path / "adapter" / "adapter_model.safetensors") for path in (many, one)), 1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_and_copies_give_the_model_of_one(ranks: Ranks, alone: Path, count: int) -> None:
    """Two ranks, two copies; four ranks, two copies on two ranks each."""
    if count == 2:
        check_same(ranks.two, ranks.output / "two", alone, (2, 1))
    else:
        check_same(ranks.four, ranks.output / "four", alone, (4, 2))


def test_errors_are_those_of_all_ranks(ranks: Ranks) -> None:
    for report in ranks.two:
        failed = report[2 * len(RANKED) : -1]
        assert [one["steps"] for one in failed] == [0, 0, 2] * 2, "no step before all lines are read"
        for i in (0, 3):
            data, long, wild = (one["error"] for one in failed[i : i + 3])
            assert re.search(r"tag.jsonl: line 9: a span is from 0 to 9 of a text of 1 characters$", data)
            assert re.search(r"classify.jsonl: line 8: 81 tokens are more than max_seq_len 64", long)
            assert re.search(r"^step 2: the (loss|norm of the gradient) is (nan|inf): lower the learning rate$", wild)
    assert {path.name for path in ranks.output.glob("failed*")} == {"failed language 2", "failed language 1"}
    assert ranks.two[0] == ranks.two[1]


@pytest.fixture(scope="module")
def alone(heads: Path, files: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same jobs on one rank."""
    output = tmp_path_factory.mktemp("alone")
    for job in rank_jobs(heads, files, output, (1,)):
        lora = job["config"].get("lora")
        finetune(TrainingConfig(**{**job["config"], "lora": lora and Lora(**lora)}), job["ckpt_dir"], **CPU)
    return output


# --- killed -----------------------------------------------------------------------------------------------------------


def bytes_in(output: Path) -> dict[str, bytes]:
    """All files but the progress, whose history is compared by itself, and pictures, which may hold times."""
    paths = [path for path in output.rglob("*") if path.is_file()]
    return {str(p.relative_to(output)): p.read_bytes() for p in paths if p.name not in ("training.json", "curves.png")}


def names_in(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


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
            LlamaError, match=rf"{message}.*: use the same .*, name another --output, or start with --force"
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
    assert said[0] == f"{killed}: going on after step 4" and len(said) == 1 + 5
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
    with pytest.raises(LlamaError, match=r"state-4-0.pt can't be read \(.*\): name another --output, or .*--force"):
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
        LlamaError, match=r"training.json is damaged, or isn't a training's progress \(.*--force to begin anew"
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
    for inside in (ckpt, ckpt / "trained"):
        before = names_in(ckpt)
        with pytest.raises(LlamaError, match="lie in each other: choose another directory"):
            begun(output=str(inside), force=True)
        assert names_in(ckpt) == before
    with pytest.raises(LlamaError, match="can't be written"):
        begun(output=str(tmp_path / "out" / "notes.txt" / "deeper"))
    begun(force=True, epochs=1)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    begun(output=str(tmp_path / "empty"), epochs=1)
    assert "model.safetensors" in names_in(tmp_path / "empty")


# --- which model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[float]], list[dict[str, Tensor]]]:
    """Makes evaluation return given values; returns copies of the models at that time."""

    def script(name: str, values: list[float]) -> list[dict[str, Tensor]]:
        models: list[dict[str, Tensor]] = []
        left: Iterator[float] = iter(values)

        def evaluate(model: TaskModel, *_: Any) -> dict[str, float]:
            models.append({n: p.detach().clone() for n, p in model.head.named_parameters()})
            return {"loss": 1.0} | {name: next(left)}

        monkeypatch.setattr(training, "evaluate", evaluate)
        return models

    return script


@pytest.mark.parametrize(
    ("task", "name", "values", "patience", "best"),
    [
        ("language", "loss", [3, 2, 2.5, 1, 1, 1.2], 2, 3),
        ("classify", "accuracy", [0.1, 0.5, 0.5, 0.4, 0.5], 3, 1),
        ("tag", "f1", [0.9] + [0.1] * 8, None, 0),
        ("answer", "f1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 1, 8),
        ("answer", "f1", [0, 0], 1, 0),
    ],
)
def test_the_best_model_is_kept_and_patience_ends(
    ckpt: Path, files: dict, tmp_path: Path, scripted: Any, task: Any, name: str, values: Any, patience: Any, best: int
) -> None:
    models = scripted(name, values)
    sizes = {"epochs": 3, "batch_size": 3, "every": 1, "patience": patience, "learning_rate": 1e-2}
    finetune(TrainingConfig(task, files[task], str(tmp_path / "out"), files[task], **sizes), ckpt, **CPU)
    assert [one[name] for one in history(tmp_path / "out")] == values
    kept = dict(TaskModel.build(tmp_path / "out", **CPU).head.named_parameters())
    for i, model in enumerate(models):
        assert all(torch.equal(kept[n], model[n]) for n in kept) == (i == best)


def test_measures_that_are_no_numbers_end_it(ckpt: Path, files: dict, tmp_path: Path, scripted: Any) -> None:
    scripted("loss", [math.nan])
    with pytest.raises(LlamaError, match="step 1: the held-out loss is nan: lower the learning rate"):
        finetune(TrainingConfig("language", files["language"], str(tmp_path / "out"), files["language"]), ckpt, **CPU)


def test_labels_of_held_out_records_are_labels(ckpt: Path, files: dict, tmp_path: Path) -> None:
    held = write(tmp_path / "eval.jsonl", [{"text": "c", "label": "c"}])
    finetune(TrainingConfig("classify", files["classify"], str(tmp_path / "out"), str(held), epochs=1), ckpt, **CPU)
    assert TaskModel.build(tmp_path / "out", **CPU).head.config.labels == ("a", "b", "c")
    held = write(tmp_path / "numbers.jsonl", [{"text": "c", "label": 1}])
    with pytest.raises(LlamaError, match=r"classify.jsonl is single_.* and .*numbers.jsonl regression: expected one"):
        finetune(
            TrainingConfig("classify", files["classify"], str(tmp_path / "other"), str(held), epochs=1), ckpt, **CPU
        )
    assert not (tmp_path / "other").exists()


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("task", DATA)
def test_an_adapter_is_read_by_peft_and_merged(task: Any, ckpt: Path, files: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if task == "answer":  # transformers' class finds nothing in the files of a language model
        base(ckpt := tmp_path / "ckpt", task)
    lora = Lora(4, 8, (*ALL_LINEAR, "output") if task == "language" else ALL_LINEAR)
    rates = {"epochs": 4, "learning_rate": 2e-2, "batch_size": 4}
    finetune(TrainingConfig(task, files[task], str(tmp_path / "out"), lora=lora, **rates), ckpt, **CPU)
    auto = getattr(transformers, f"AutoModelFor{ENDINGS[task]}")
    more = {"num_labels": len(LABELS[task])} if task in LABELS else {}
    plain = auto.from_pretrained(ckpt, **more).eval()
    adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(ckpt, **more), tmp_path / "out" / "adapter").eval()
    merged = auto.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([list(b"in Rome now")])
    for name in ("start_logits", "end_logits") if task == "answer" else ("logits",):
        with torch.no_grad():
            before, one, other = (getattr(model(input_ids=tokens), name) for model in (plain, adapted, merged))
        span = float(one.amax() - one.amin())
        assert float((one - other).abs().amax()) <= 1e-5 * span, "what peft makes of the adapter"
        assert float((one - before).abs().amax()) > 1e-2 * span, "which is something"
    only = TrainingConfig(task, files[task], str(tmp_path / "only"), lora=lora, merge=False, **rates)
    finetune(only, ckpt, **CPU)
    assert names_in(tmp_path / "only") == {"adapter", "curves.png", "training.json"} | {
        f"adapter/adapter_{name}" for name in ("config.json", "model.safetensors")
    }
    assert [*bytes_in(tmp_path / "only").values()] == [
        content for name, content in bytes_in(tmp_path / "out").items() if name.startswith("adapter")
    ]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(4, 8, ALL_LINEAR)])
@pytest.mark.parametrize("task", ["language", "tag"])
def test_mixed_precision(
    task: Any, lora: Lora | None, ckpt: Path, files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are computed in bfloat16; trained parameters and their moments are float32."""
    seen: list[Training] = []
    monkeypatch.setattr(Training, "load_state", None)
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self: [seen.append(self), step(self)][1])
    rates = {"epochs": 12, "learning_rate": 1e-2, "every": 3, "recompute": task == "tag"}
    config = TrainingConfig(task, files[task], str(tmp_path / "out"), files[task], lora=lora, **rates)
    finetune(config, ckpt, device="cpu", dtype="bfloat16")
    trained = seen[0].parameters
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for n, p in seen[0].model.head.named_parameters() if n not in trained}
    assert frozen == (set() if lora is None else {torch.bfloat16})
    state = seen[0].optimizer.state_dict()["state"]
    assert {moment.dtype for one in state.values() for moment in one.values()} == {torch.float32}
    told = history(tmp_path / "out")
    assert told[-1]["trained"] < 0.8 * told[0]["trained"]
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


def test_float16_is_refused(ckpt: Path, files: dict, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match=r"float16 .*train in bfloat16 or float32"):
        finetune(TrainingConfig("tag", files["tag"], str(tmp_path / "out")), ckpt, device="cpu", dtype="float16")
    assert not (tmp_path / "out").exists()


LONG = {"question": "who", "context": "so it is " * 30 + "Rome here " + "and so on " * 9}
LEARNT: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{f"language {next(iter(one))}": ("language", [one]) for one in DATA["language"][3:]},
    "language text": ("language", [{"text": "abc " * 20}, {"text": "xyz"}]),
    "single": ("classify", DATA["classify"]),
    "several": ("classify", [{"text": "a", "labels": ["x"]}, {"text": "b", "labels": ["x", "y"]}]),
    "none of several": ("classify", [{"text": "a", "labels": []}, {"text": "b", "labels": ["x"]}]),
    "regression": ("classify", [{"text": "a", "label": 2}, {"text": "b", "label": -1.5}]),
    "tag": ("tag", DATA["tag"]),
    "tag long": ("tag", [{"text": "so in Rome " * 40, "spans": [{"start": 6, "end": 10, "label": "p"}]}]),
    "answer": ("answer", DATA["answer"]),
    "answer long": ("answer", [{**LONG, "answers": [{"text": "Rome", "start": LONG["context"].index("Rome")}]}]),
    "no answer": ("answer", [{**LONG, "answers": []}, *DATA["answer"]]),
}


@pytest.mark.parametrize("name", LEARNT)
def test_every_task_is_learnt(name: str, ckpt: Path, tmp_path: Path) -> None:
    task, lines = LEARNT[name]
    data = str(write(tmp_path / "data.jsonl", lines))
    sizes = {"epochs": 30, "learning_rate": 1e-2, "every": 10, "max_seq_len": 200}
    config = TrainingConfig(task, data, str(tmp_path / "out"), data, **sizes)  # type: ignore[arg-type]
    finetune(config, ckpt, **CPU)
    told = history(tmp_path / "out")
    assert told[-1]["trained"] < 0.5 * told[0]["trained"]
    assert told[-1]["loss"] < 0.5 * told[0]["trained"]


# --- what can't be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sing"}, "task is 'sing', expected one of language, classify, tag, answer"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"max_seq_len": -1}, "max_seq_len is -1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"every": 0}, "every is 0"),
        ({"patience": 0, "eval": "f"}, "patience is 0"),
        ({"patience": 1}, "patience was given without eval"),
        ({"seed": "x"}, "seed is"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"clip": -1}, "clip is -1"),
        ({"warmup": 1.1}, r"warmup is 1.1, expected a share of the steps, in \[0, 1\]"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"merge": False}, "merge is off, but there is no adapter"),
    ],
)
def test_configs_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        TrainingConfig(**{"task": "tag", "data": "f", "output": "d", **options})


def test_what_no_model_can_learn_is_refused(ckpt: Path, files: dict, tmp_path: Path) -> None:
    """Refused before any step, without making the output directory."""
    empty = str(write(tmp_path / "empty.jsonl", [b""]))
    unknown = str(write(tmp_path / "none.jsonl", [{"text": "a", "labels": []}]))
    targets = Lora(2, 4, ("output",))
    for config, message in (
        (TrainingConfig("tag", empty, str(tmp_path / "out")), "empty.jsonl has no lines"),
        (TrainingConfig("tag", files["tag"], str(tmp_path / "out"), empty), "empty.jsonl has no lines"),
        (TrainingConfig("tag", str(tmp_path / "no"), str(tmp_path / "out")), "no can't be read"),
        (TrainingConfig("classify", unknown, str(tmp_path / "out")), "expected at least one name"),
        (TrainingConfig("classify", files["classify"], str(tmp_path / "out"), lora=targets), "targets has output"),
        (TrainingConfig("language", files["language"], str(tmp_path / "out"), max_seq_len=1), "max_seq_len"),
    ):
        with pytest.raises(LlamaError, match=message):
            finetune(config, ckpt, **CPU)
        assert not (tmp_path / "out").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def command(ckpt: Path, data: str, output: Path, *more: str, task: str = "tag") -> list[str]:
    where = ["--ckpt_dir", str(ckpt), "--data", data, "--output", str(output), "--device", "cpu", "--dtype", "float32"]
    sizes = ["--epochs", "3", "--batch_size", "4", "--max_seq_len", "64", "--learning_rate", "1e-2"]
    return ["-m", "llama", "finetune", "--task", task, *where, *sizes, *more]


def test_the_command_says_what_it_does(ckpt: Path, files: dict, tmp_path: Path) -> None:
    options = ["--eval", files["tag"], "--lora_r", "2", "--lora_targets", "wq,w2", "--micro_batch_size", "2"]
    done = run_program(*command(ckpt, files["tag"], tmp_path / "out", *options))
    assert (done.returncode, done.stderr) == (0, ""), "and no bar where nobody looks"
    lines = done.stdout.splitlines()
    number = r"\d[\d.e-]*"
    measures = "".join(f", {name} {number}" for name in ("loss", "held-out loss", "precision", "recall", "f1"))[2:]
    assert len(lines) == 3
    for i, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"step {2 * i}, epoch {i}.00: {measures}", line), line
    assert [f"{one['loss']:.4g}" for one in history(tmp_path / "out")] == [
        line.split("held-out loss ")[1].split(",")[0] for line in lines
    ]
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and 300 < height < width < 2000 and len(picture) < 300_000
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (2, 4, ["down_proj", "q_proj"])
    config = {"lora": Lora(2, 4, ("wq", "w2")), "micro_batch_size": 2, "epochs": 3, "batch_size": 4, "max_seq_len": 64}
    finetune(
        TrainingConfig("tag", files["tag"], str(tmp_path / "same"), files["tag"], learning_rate=1e-2, **config),
        ckpt,
        **CPU,
    )
    assert_near(weights(tmp_path / "out"), weights(tmp_path / "same"), 1e-5)


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mistake_is_told_in_one_line(ckpt: Path, spoiled: Path, tmp_path: Path, ranks: int) -> None:
    done = run_program(*command(ckpt, str(spoiled / "tag.jsonl"), tmp_path / "out"), ranks=ranks)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    message = f"{spoiled}/tag.jsonl: line 9: a span is from 0 to 9 of a text of 1 characters"
    assert said == [f"error: rank 0: {message}" if ranks else f"error: {message}"]
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr.partition("error: ")[0]
    assert ranks or done.stderr == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_alpha", "3"], "--lora_alpha was given without --lora_r"),
        (["--adapter_only"], "--adapter_only was given without --lora_r"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], message: str, ckpt: Path, files: dict, tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    finetune_command.add_options(parser)
    with pytest.raises(LlamaError, match=message):
        finetune_command.run(parser.parse_args(command(ckpt, files["tag"], tmp_path / "out", *more)[3:]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_they_go_on(ckpt: Path, files: dict, tmp_path: Path, ranks: Ranks) -> None:
    """On two ranks, with dropout, the files are equal to the byte to those of a run that wasn't killed."""
    given = command(ckpt, files["tag"], tmp_path / "out", "--eval", files["tag"], "--every", "1")
    started = subprocess.Popen(
        launched(*given, ranks=2),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started as running:
        assert running.stdout is not None
        assert [running.stdout.readline().partition(",")[0] for _ in range(2)] == ["step 1", "step 2"]
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        (second,) = (int(pid) for pid in children if rank_of(int(pid)) == "1")
        os.kill(second, signal.SIGKILL)
        since = time.monotonic()
        _, said = running.communicate(timeout=60)
    assert running.returncode != 0 and time.monotonic() - since < 40
    assert "Signal 9 (SIGKILL)" in said and "RuntimeError" not in said
    done = run_program(*given, ranks=2)
    assert done.returncode == 0, done.stderr
    assert re.match(r".*: going on after step [1-5]\n", done.stdout), done.stdout
    assert ranks.two[0][-1] == {"error": None, "steps": 6, "left open": 0}
    assert bytes_in(tmp_path / "out") == bytes_in(ranks.output / "whole")
    assert history(tmp_path / "out") == history(ranks.output / "whole") and len(history(tmp_path / "out")) == 6


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((one[5:].decode() for one in variables if one.startswith(b"RANK=")), "")
