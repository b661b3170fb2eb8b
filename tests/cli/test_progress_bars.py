"""Every long step shows a progress bar at a terminal, and none if its output is piped.

(Loading: checkpoints/test_loader.py; lines of a file: test_batch_command.py.)
"""

import re
from pathlib import Path

import pytest
from terminal import Terminal
from tiny import run_program, write_checkpoint

PROGRAM = """
import sys
from pathlib import Path
from llama import Llama, TaskModel
from llama._util import console
from llama.checkpoints.convert import convert
from llama.training.trainer import finetune
from llama.training.config import TrainingConfig

console.SECONDS_BEFORE_BAR = 0
where, cpu = Path(sys.argv[1]), {"device": "cpu", "dtype": "float32"}
convert(where / "meta", where / "hf", "hf", force=True)
llama = Llama.build(where / "meta", **cpu)
llama.score(["hello", "a"])
llama.embed(["hello", "a"])
plan = TrainingConfig("tag", str(where / "data.jsonl"), str(where / "tag"), epochs=1, max_seq_len=64)
finetune(plan, where / "hf", **cpu, force=True)
TaskModel.build(where / "tag", **cpu).tag(["hello", "a"])
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_checkpoint(tmp_path / "meta")
    (tmp_path / "data.jsonl").write_text('{"text": "a b", "spans": [{"start": 0, "end": 1, "label": "X"}]}\n')
    return ["-c", PROGRAM, str(tmp_path)]


def test_a_terminal_gets_bars_and_a_pipe_gets_none(command: list[str]) -> None:
    piped = run_program(*command)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert re.fullmatch(r"step 1, epoch 1.00: loss [\d.]+\nwrote [^\n]+\n", piped.stdout)
    terminal = Terminal(*command)
    try:
        for step in ("writing", "scoring", "embedding", "training", "tagging"):
            terminal.wait_for(rf"{step}: +100%")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
