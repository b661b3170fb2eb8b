"""`python -m llama finetune`: what it prints and writes, and mistakes told in one line."""

import argparse
import json
import re
import struct
from pathlib import Path

import pytest
import tiny_training
from tiny import run_program
from tiny_training import CPU, assert_near, command, history, weights

from llama import LlamaError
from llama.adapters.lora import Lora
from llama.cli import finetune as finetune_command
from llama.training.trainer import TrainingConfig, finetune

ckpt = tiny_training.ckpt
files = tiny_training.files
no_picture = tiny_training.no_picture
spoiled = tiny_training.spoiled


def test_the_command_says_what_it_does(ckpt: Path, files: dict, tmp_path: Path) -> None:
    options = ["--eval", files["tag"], "--lora_r", "2", "--lora_targets", "wq,w2", "--micro_batch_size", "2"]
    done = run_program(*command(ckpt, files["tag"], tmp_path / "out", *options))
    assert (done.returncode, done.stderr) == (0, ""), "and no bar where nobody looks"
    *lines, last = done.stdout.splitlines()
    assert last.startswith(f"wrote {tmp_path / 'out'}: adapter, config.json, curves.png, "), last
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
