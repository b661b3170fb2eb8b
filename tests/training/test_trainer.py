"""Fine-tuning of tiny random models on one process. The oracle of the steps is a plain loop with transformers."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
import torch.nn.functional as F
import transformers
from json_lines import write
from tiny_heads import ENDINGS
from tiny_training import ALL_LINEAR, CPU, DATA, LABELS, assert_near, base, bytes_in, history, names_in, weights
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama import LlamaError, TaskModel
from llama.adapters.lora import Lora
from llama.training import trainer as training
from llama.training.preprocessing import Example
from llama.training.trainer import Training, TrainingConfig, finetune

ckpt, files, no_picture = tiny_training.ckpt, tiny_training.files, tiny_training.no_picture


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
