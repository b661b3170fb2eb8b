"""One model on 1, 2 and 4 ranks is one model; and when something is wrong on one rank, all end, and say why."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from rank_program import collectives_of_two_steps, compute, unequal_work
from tiny import environment, launched, run_program, split_checkpoint, write_checkpoint

from llama.accelerate.kernels import cpu


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "ckpt")


def results(pool: RankPool, directory: Path, ranks: int, model_parallel_size: int | None = None) -> list[dict]:
    done = pool.run(compute, str(directory), model_parallel_size, ranks=ranks)
    assert done.stdout == ""
    return done.results


@pytest.fixture(scope="module")
def one(pool: RankPool, directory: Path) -> dict:
    """Without torchrun: this process alone, no port, no environment variable."""
    return results(pool, directory, 0)[0]


def close(a: list, b: list, tolerance: float) -> bool:
    x, y = torch.tensor(a), torch.tensor(b)
    return bool((x - y).abs().max() <= tolerance * (y.max() - y.min()))


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, False), (2, True), (4, False)])
def test_ranks_agree_with_one_process(
    pool: RankPool, directory: Path, one: dict, tmp_path: Path, ranks: int, sharded: bool
) -> None:
    source = split_checkpoint(directory, tmp_path / "split", ranks) if sharded else directory
    found = results(pool, source, ranks)
    for result in found:
        assert close(result["logits"], one["logits"], 1e-5)
        assert close(result["norm_gradient"], one["norm_gradient"], 1e-5)
        assert result["greedy"] == one["greedy"]
        assert result["sampled"] == one["sampled"]
        assert all(close(a, b, 1e-4) for a, b in zip(result["logprobs"], one["logprobs"], strict=True))
        assert result["read_by_rank_0"] == f"rank 0 of {ranks}"
    if ranks > 1:
        assert found[0]["parameters"] < 0.6 * one["parameters"], "a rank holds its share only"


def test_a_larger_world_is_data_parallel(pool: RankPool, directory: Path, one: dict) -> None:
    for result in results(pool, directory, 4, 2):
        assert result["greedy"] == one["greedy"]
        assert result["sampled"] == one["sampled"]
        assert 0.4 * one["parameters"] < result["parameters"] < 0.6 * one["parameters"]


def test_data_parallel_groups_may_do_different_work(pool: RankPool, directory: Path, one: dict) -> None:
    """One group asks three times, the other once and wrongly: neither waits for the other."""
    first, second = pool.run(unequal_work, str(directory), ranks=2).results
    assert first == [one["greedy"][1]] * 3
    assert second == ["prompt 0 is empty: give it at least one character"]


@pytest.mark.parametrize("sockets", [False, True])
def test_collectives_of_a_step(pool: RankPool, directory: Path, sockets: bool) -> None:
    """One after wo and one after w2 in each of 2 layers, one for the embedding, the logits', and the tokens chosen.

    And before all of them one, of two numbers, in which the ranks agree that they make the same step.
    """
    meet = cpu.library() is not None and not sockets
    sums, gathers = ("sum_of_ranks_float", "gather_of_ranks") if meet else ("c10d::allreduce_", "c10d::allgather_")
    for calls in pool.run(collectives_of_two_steps, str(directory), sockets, ranks=2).results:
        agreed = {"c10d::allgather_": 2} if meet else {}
        assert calls == {sums: 2 * (2 * 2 + 1), gathers: 2 if meet else 2 + 2, "c10d::broadcast_": 2, **agreed}


@pytest.mark.slow
def test_too_many_ranks_are_told_by_one_line(directory: Path) -> None:
    done = run_program("example_text_completion.py", "--ckpt_dir", str(directory), "--device", "cpu", ranks=3)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ours == [
        f"error: {directory} can't be divided over 3 model-parallel ranks (n_heads 8, n_kv_heads 4, hidden_dim 192, "
        "vocab_size 512): start with torchrun --nproc_per_node 1 or 2 or 4 or 8"
    ]


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_ends_all(directory: Path, tmp_path: Path) -> None:
    program = tmp_path / "unlike.py"
    program.write_text(
        "import os, sys\n"
        "from llama import Llama\n"
        "from llama.cli.program import errors_in_one_line\n"
        "with errors_in_one_line():\n"
        "    Llama.build(sys.argv[1] + '/none' * int(os.environ['RANK']), device='cpu')\n"
    )
    started = time.monotonic()
    done = run_program(str(program), str(directory), ranks=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert ours[0].startswith(f"error: rank 1: ckpt_dir {directory}/none: found nothing there")
    assert time.monotonic() - started < 110, "no rank waits the half hour that a collective may take"


def test_a_killed_rank_ends_the_others(directory: Path, tmp_path: Path) -> None:
    program = tmp_path / "endless.py"
    program.write_text(
        "import os, sys\n"
        "from llama import Llama\n"
        "from llama.cli.program import errors_in_one_line\n"
        "with errors_in_one_line():\n"
        "    llama = Llama.build(sys.argv[1], device='cpu', dtype='float32')\n"
        "    open(f'{sys.argv[2]}/pid.{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n"
        "    while True:\n"
        "        llama.text_completion(['hello'], max_gen_len=50)\n"
    )
    with subprocess.Popen(
        launched(str(program), str(directory), str(tmp_path), ranks=2),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        pids = [tmp_path / "pid.0", tmp_path / "pid.1"]
        wait_until(lambda: all(p.exists() and p.read_text() for p in pids), 90)
        time.sleep(1)
        os.kill(int(pids[1].read_text()), signal.SIGKILL)
        _, said = running.communicate(timeout=90)
    assert running.returncode != 0
    assert "Signal 9 (SIGKILL)" in said, "the error that ended it is shown"
    assert "RuntimeError" not in said, "and no traceback through torch's collectives"
    wait_until(lambda: not Path(f"/proc/{pids[0].read_text()}").exists(), 30)


def wait_until(holds: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
