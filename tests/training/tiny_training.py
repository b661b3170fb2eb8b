"""What the tests of fine-tuning share: tiny random checkpoints, records of each task, and comparisons of outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from json_lines import write
from records import GOOD
from safetensors.torch import load_file
from tiny import write_tokenizer
from tiny_heads import make
from torch import Tensor

from llama.adapters.lora import TARGETS
from llama.training import trainer as training

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


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spoiled")
    write(root / "tag.jsonl", [*DATA["tag"], b"", {"text": "a", "spans": [{"start": 0, "end": 9, "label": "x"}]}])
    write(root / "classify.jsonl", [*DATA["classify"], {"text": "x" * 80, "label": "a"}])
    return root


def bytes_in(output: Path) -> dict[str, bytes]:
    """All files but the progress, whose history is compared by itself, and pictures, which may hold times."""
    paths = [path for path in output.rglob("*") if path.is_file()]
    return {str(p.relative_to(output)): p.read_bytes() for p in paths if p.name not in ("training.json", "curves.png")}


def names_in(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


def command(ckpt: Path, data: str, output: Path, *more: str, task: str = "tag") -> list[str]:
    where = ["--ckpt_dir", str(ckpt), "--data", data, "--output", str(output), "--device", "cpu", "--dtype", "float32"]
    sizes = ["--epochs", "3", "--batch_size", "4", "--max_seq_len", "64", "--learning_rate", "1e-2"]
    return ["-m", "llama", "finetune", "--task", task, *where, *sizes, *more]
