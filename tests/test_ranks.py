"""One model on 1, 2 and 4 ranks is one model; and when something is wrong on one rank, all end, and say why."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tiny import environment, launched, run_program, split_checkpoint, write_checkpoint

from llama.accelerate.kernels import cpu

PROGRAM = "tests/rank_program.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "ckpt")


def results(directory: Path, output: Path, ranks: int, *more: str) -> list[dict]:
    done = run_program(PROGRAM, str(directory), str(output), *more, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(max(ranks, 1))]


@pytest.fixture(scope="module")
def one(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Without torchrun: this process alone, no port, no environment variable."""
    return results(directory, tmp_path_factory.mktemp("one") / "out", 0)[0]


def close(a: list, b: list, tolerance: float) -> bool:
    x, y = torch.tensor(a), torch.tensor(b)
    return bool((x - y).abs().max() <= tolerance * (y.max() - y.min()))


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, False), (2, True), (4, False)])
def test_ranks_agree_with_one_process(directory: Path, one: dict, tmp_path: Path, ranks: int, sharded: bool) -> None:
    source = split_checkpoint(directory, tmp_path / "split", ranks) if sharded else directory
    found = results(source, tmp_path / "out", ranks)
    for result in found:
        assert close(result["logits"], one["logits"], 1e-5)
        assert close(result["norm_gradient"], one["norm_gradient"], 1e-5)
        assert result["greedy"] == one["greedy"]
        assert result["sampled"] == one["sampled"]
        assert all(close(a, b, 1e-4) for a, b in zip(result["logprobs"], one["logprobs"], strict=True))
        assert result["read_by_rank_0"] == f"rank 0 of {ranks}"
    if ranks > 1:
        assert found[0]["parameters"] < 0.6 * one["parameters"], "a rank holds its share only"


def test_a_larger_world_is_data_parallel(directory: Path, one: dict, tmp_path: Path) -> None:
    for result in results(directory, tmp_path / "out", 4, "2"):
        assert result["greedy"] == one["greedy"]
        assert result["sampled"] == one["sampled"]
        assert 0.4 * one["parameters"] < result["parameters"] < 0.6 * one["parameters"]


def test_data_parallel_groups_may_do_different_work(directory: Path, one: dict, tmp_path: Path) -> None:
    """One group asks three times, the other once and wrongly: neither waits for the other."""
    program = tmp_path / "unequal.py"
    program.write_text(
        "import json, os, sys\n"
        "from llama import Llama, LlamaError\n"
        "rank = int(os.environ['RANK'])\n"
        "llama = Llama.build(sys.argv[1], model_parallel_size=1, device='cpu', dtype='float32')\n"
        "if rank == 0:\n"
        "    said = [llama.text_completion(['a'], temperature=0, max_gen_len=40)[0]['generation'] for _ in range(3)]\n"
        "else:\n"
        "    try:\n"
        "        llama.text_completion([''])\n"
        "    except LlamaError as e:\n"
        "        said = [str(e)]\n"
        "open(f'{sys.argv[2]}.{rank}', 'w').write(json.dumps(said))\n"
    )
    done = run_program(str(program), str(directory), str(tmp_path / "out"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.0").read_text()) == [one["greedy"][1]] * 3
    assert json.loads((tmp_path / "out.1").read_text()) == ["prompt 0 is empty: give it at least one character"]


@pytest.mark.parametrize("sockets", [False, True])
def test_collectives_of_a_step(directory: Path, tmp_path: Path, sockets: bool) -> None:
    """One after wo and one after w2 in each of 2 layers, one for the embedding, the logits', and the tokens chosen."""
    program = tmp_path / "counting.py"
    program.write_text(
        "import json, os, sys\n"
        "from collections import Counter\n"
        "from torch.profiler import ProfilerActivity, profile\n"
        "from llama import Llama\n"
        "from llama.accelerate import accelerator\n"
        "from llama.accelerate.kernels import cpu\n"
        "if sys.argv[3] == 'sockets':\n"
        "    accelerator.share_memory = lambda: None\n"
        "llama = Llama.build(sys.argv[1], device='cpu', dtype='float32')\n"
        "stream = llama.stream([[1, 2, 3], [4]], 6, temperature=0)\n"
        "next(stream)\n"
        "calls, call = Counter(), cpu.call\n"
        "def pluralize(name, *rest):\n"
        "    calls.update([name] if 'of_ranks' in name and rest[-1] == 0 else [])  # and not one that waits on\n"
        "    return call(name, *rest)\n"
        "cpu.call = counted\n"
        "with profile(activities=[ProfilerActivity.CPU]) as seen:\n"
        "    next(stream), next(stream)\n"
        "calls.update({event.key: event.count for event in seen.key_averages() if 'c10d::' in event.key})\n"
        "open(f'{sys.argv[2]}.' + os.environ['RANK'], 'w').write(json.dumps(calls))\n"
    )
    done = run_program(str(program), str(directory), str(tmp_path / "out"), "sockets" if sockets else "memory", ranks=2)
    assert done.returncode == 0, done.stderr
    meet = cpu.library() is not None and not sockets
    sums, gathers = ("sum_of_ranks_float", "gather_of_ranks") if meet else ("c10d::allreduce_", "c10d::allgather_")
    for rank in range(2):
        calls = json.loads((tmp_path / f"out.{rank}").read_text())
        assert calls == {sums: 2 * (2 * 2 + 1), gathers: 2, "c10d::broadcast_": 2}


def test_too_many_ranks_are_told_by_one_line(directory: Path) -> None:
    done = run_program("example_text_completion.py", "--ckpt_dir", str(directory), "--device", "cpu", ranks=3)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ours == [
        f"error: {directory} can't be divided over 3 model-parallel ranks (n_heads 8, n_kv_heads 4, hidden_dim 192, "
        "vocab_size 512): start with torchrun --nproc_per_node 1 or 2 or 4 or 8"
    ]


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
