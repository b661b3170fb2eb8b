"""Files that an earlier version wrote still load: quantized checkpoints, a killed training, a part of an output.

The files in tests/earlier/ were written by commit 2113919, and so were the numbers and texts that are expected here.
They are never written anew.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ARGS, ROOT, write_checkpoint

from llama import ModelArgs, TrainingConfig, finetune
from llama.adapters.lora import Lora
from llama.bench.plots import Chart
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.schema import tensor_shapes
from llama.cli.commands import main

EARLIER = ROOT / "tests" / "earlier"
PACKED = ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=8, multiple_of=64)


def original(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that was quantized: the `index`th of `tensor_shapes`."""
    numbers = np.sin(np.arange(math.prod(shape)) * (index + 1) * 0.37) / 4
    return torch.from_numpy(numbers).reshape(shape).to(torch.bfloat16)


@pytest.mark.parametrize(("quantization", "steps"), [("int8", 254), ("int4", 15)])
def test_a_quantized_checkpoint(quantization: str, steps: int) -> None:
    """Each number is at most a step, of the range in so many steps, from the one that was quantized."""
    checkpoint = open_checkpoint(EARLIER / quantization)
    assert checkpoint.quantization == quantization
    for index, (name, shape) in enumerate(tensor_shapes(PACKED).items()):
        expected, actual = original(index, shape), checkpoint.part(name)
        assert actual.shape == expected.shape and actual.dtype == torch.bfloat16
        if checkpoint.is_quantized(name):
            assert (actual - expected).abs().max() < 0.5 / steps, name
        else:
            assert torch.equal(actual, expected), name


TEXTS = ["good day", "bad night", "good sun", "bad rain", "good sea", "bad wind", "a good end", "a bad end"]
LOSSES = [0.6336833, 0.6301603, 0.9182163, 0.7671961, 0.2240168, 0.6609700, 0.4449588, 0.5396202]
HELD_OUT = {2: 0.6022284, 4: 0.4962443, 6: 0.4471839, 8: 0.4250490}


def test_a_training_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "output"
    records = ({"text": text, "label": "yes" if "good" in text else "no"} for text in TEXTS)
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    checkpoint = write_checkpoint(tmp_path / "ckpt", ModelArgs(**{**vars(ARGS), "n_layers": 1}))
    shutil.copytree(EARLIER / "training", output)
    progress = json.loads((output / "training.json").read_text())
    progress["about"]["ckpt_dir"] = str(checkpoint.resolve())  # the one thing that another machine has elsewhere
    (output / "training.json").write_text(json.dumps(progress))
    config = TrainingConfig(
        *("classify", str(data), str(output)),
        **{"eval": str(data), "epochs": 2, "batch_size": 2, "every": 2, "learning_rate": 1e-2, "max_seq_len": 32},
        lora=Lora(1, 2.0, ("wq",)),
        merge=False,
    )
    finetune(config, checkpoint, device="cpu", dtype="float32")
    assert "after step 4" in capsys.readouterr().out
    ended = json.loads((output / "training.json").read_text())["progress"]
    assert ended["ended"] and ended["losses"] == pytest.approx(LOSSES, abs=1e-4)
    assert {entry["step"]: entry["loss"] for entry in ended["history"]} == pytest.approx(HELD_OUT, abs=1e-4)


LINES = """{"id": "fr", "prompt": "sea =>", "stop": "\\n"}
{"messages": [{"role": "user", "content": "What is the capital of France?"}]}
{"prompt": "sea =>", "temperature": "hot"}
{"prompt": "a b c", "n": 2}
"""
ABOUT = {
    "input": "c93b44402209f62a6e278d0c2c5fd0682cfba0fe0059abf36bc4755052acf3fb",
    **{"tokenizer_path": None, "max_seq_len": 512, "dtype": "float32", "quantization": None},
    "ckpt_dir": str((ROOT / "demo" / "model").resolve()),
    **{"max_gen_len": 8, "temperature": 0.0, "top_k": None, "top_p": 0.9, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "stop": [], "seed": 1},
}
DONE = {
    3: {"line": 3, "error": "temperature is 'hot', expected a number of at least 0"},
    2: {"line": 2, "generation": "The capital of France is Paris.", "finish_reason": "stop", "stop": 2825},
    1: {"line": 1, "id": "fr", "generation": " the capital of Malta.", "finish_reason": "stop", "stop": 2817},
}
TWICE = ["a is the capital of Indonesia."] * 2
LAST = {"line": 4, "generation": TWICE, "finish_reason": ["stop", "stop"], "stop": [2817, 2817]}


def test_a_part_of_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "answers.jsonl"
    source.write_text(LINES)
    lines = [{"about": ABOUT, "fixed": {"today": "2026-11-29T19:35:47.530744"}}, DONE[3], None, DONE[2], DONE[1], None]
    part = "".join("\n" if line is None else f"{json.dumps(line)}\n" for line in lines)
    output.with_name("answers.jsonl.part").write_text(part + '{"line": 4, "gener')
    words = ["complete", "--input", str(source), "--output", str(output), "--temperature", "0", "--max_gen_len", "8"]
    words += ["--max_batch_size", "2", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["llama", *words])
    main()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records == [DONE[1], DONE[2], DONE[3], LAST]


def test_what_a_benchmark_printed(tmp_path: Path) -> None:
    (point,) = Chart(str(tmp_path / "speed.png"), [str(EARLIER / "bench.json")]).points
    assert (point.subject, point.ranks, point.rows, point.prompt) == ("llama, demo float32", 1, 1, 8)
    assert (point.prefill, point.decode) == pytest.approx((156.005121, 41.624880))
