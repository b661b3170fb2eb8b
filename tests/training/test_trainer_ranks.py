"""Fine-tuning on several ranks gives the model, the errors and the files of a single process."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from finetune_program import finetune_all
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny import ROOT, environment, launched, run_program
from tiny_training import ALL_LINEAR, CPU, DATA, assert_near, base, bytes_in, command, history, weights

from llama.adapters.lora import Lora
from llama.training.trainer import TrainingConfig, finetune

ckpt = tiny_training.ckpt
files = tiny_training.files
no_picture = tiny_training.no_picture
spoiled = tiny_training.spoiled

# --- the same as one process ------------------------------------------------------------------------------------------

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
