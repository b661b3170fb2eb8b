"""A max_seq_len above the positions that a model was made for is told in a line, by commands and `inspect`."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import run_program, write_hf_checkpoint

from llama.checkpoints.checkpoint import Checkpoint
from llama.checkpoints.inspect import inspect
from llama.checkpoints.loader import find_checkpoint
from llama.checkpoints.trained_length import describe_excess

pytestmark = pytest.mark.usefixtures("place")
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8}
SAYS = "positions that the model was made for: what is past them may come out badly"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("length"), endless=True)


def set_config(directory: Path, **values: Any) -> Path:
    """The keys that say how long texts may be. "drop" removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"rope_scaling": None, "rope_parameters": None, "rope_theta": 1e4} | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))
    return directory


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"max_position_embeddings": 32}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": LLAMA3}, 64),
        ({"max_position_embeddings": 96, "rope_scaling": LLAMA3}, 96),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 2.0}}, 64),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 128),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 128),
        ({"max_position_embeddings": "drop"}, None),
    ],
)
def test_the_length_is_what_the_configuration_says(directory: Path, values: dict[str, Any], length: int | None) -> None:
    checkpoint = Checkpoint(*find_checkpoint(set_config(directory, **values)))
    for size in (8, length or 512, (length or 512) + 1):
        is_longer = length is not None and size > length
        expected = f"max_seq_len {size} is more than the {length} {SAYS}" if is_longer else None
        assert describe_excess(checkpoint, size) == expected


def test_inspect_notes_it(directory: Path) -> None:
    report = inspect(set_config(directory, max_position_embeddings=32), max_seq_len=33)
    assert report.notes == [f"max_seq_len 33 is more than the 32 {SAYS}"]
    assert not [problem for problem in report.problems if "max_seq_len" in problem]


def test_a_command_says_it_once_and_runs(directory: Path) -> None:
    set_config(directory, max_position_embeddings=32)
    words = ("-m", "llama", "complete", "hello", "--max_gen_len", "4", "--device", "cpu", "--ckpt_dir", str(directory))
    done = run_program(*words, "--max_seq_len", "64")
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr == f"(max_seq_len 64 is more than the 32 {SAYS})\n"
