"""Task heads: logits, losses and gradients of transformers' classes, on 1, 2 and 4 ranks, padded on either side."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_program import compute
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny import write_tokenizer
from tiny_heads import ENDINGS, FAMILIES, LABELS, make, quiet_load
from torch import Tensor
from transformers import PreTrainedModel

from llama import Llama, LlamaError, TaskModel
from llama.adapters.lora import Lora, add_lora, lora_parameters
from llama.adapters.peft import save_adapter
from llama.checkpoints.convert import convert
from llama.tasks import losses

PAD, LENGTHS, T = 511, (5, 9, 3), 9


def padded(rows: list[list[int]], side: str, with_: int) -> list[list[int]]:
    fill = [[with_] * (T - len(row)) for row in rows]
    return [row + more if side == "right" else more + row for row, more in zip(rows, fill, strict=True)]


def inputs(task: str, side: str) -> dict[str, Any]:
    """A batch of rows of LENGTHS tokens. One row also has the id of the padding in its text."""
    chance = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 510, (n,), generator=chance).tolist() for n in LENGTHS]
    actual = {"tokens": padded(rows, side, PAD), "attention_mask": padded([[1] * n for n in LENGTHS], side, 0)}
    starts = [0 if side == "right" else T - n for n in LENGTHS]
    if task == "language":
        labels = [[-100, -100, *row[2:]] for row in rows]
        return {**actual, "labels": padded(labels, side, -100)}
    if task == "classify":
        return {**actual, "labels": [2, 0, 1]}
    if task == "tag":
        labels = [torch.randint(0, 3, (n,), generator=chance).tolist() for n in LENGTHS]
        labels[1][4] = -100
        return {**actual, "labels": padded(labels, side, -100)}
    return {**actual, "start_positions": [s + 1 for s in starts], "end_positions": [s + 2 for s in starts]}


def theirs(model: PreTrainedModel, given: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(logits and loss, gradients by name). The loss of answers is computed here, without padding in the softmax."""
    tensors = {name: torch.tensor(value) for name, value in given.items()}
    tokens = tensors.pop("tokens")
    if "start_positions" not in tensors:
        out = model(input_ids=tokens, **tensors)
        out.loss.backward()
        actual = {"loss": out.loss, "logits": out.logits}
    else:
        mask = tensors["attention_mask"].bool()
        out = model(input_ids=tokens, attention_mask=tensors["attention_mask"])
        both = [x.masked_fill(~mask, -torch.inf) for x in (out.start_logits, out.end_logits)]
        places = tensors["start_positions"], tensors["end_positions"]
        loss = sum(F.cross_entropy(x, y) for x, y in zip(both, places, strict=True)) / 2
        loss.backward()
        actual = {"loss": loss, "start_logits": both[0], "end_logits": both[1]}
    return {k: v.detach() for k, v in actual.items()}, {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


CASES = [(family, task, side) for family in FAMILIES for task in ENDINGS for side in ("right", "left")]


@pytest.fixture(scope="module")
def actual(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs all cases on a number of ranks, which are started once."""
    root = tmp_path_factory.mktemp("heads")
    for family in FAMILIES:
        for task in ENDINGS:
            make(family, task).save_pretrained(root / f"{family} {task}")
            write_tokenizer(root / f"{family} {task}" / "tokenizer.model")

    @cache
    def on(ranks: int) -> Path:
        jobs = [
            {
                "directory": str(root / f"{family} {task}"),
                "inputs": inputs(task, side),
                "recomputed": side == "left",
                "output": str(root / f"{ranks}" / f"{family} {task} {side}"),
            }
            for family, task, side in CASES
        ]
        pool.run(compute, jobs, ranks=0 if ranks == 1 else ranks)
        return root / f"{ranks}"

    return on


def assert_close(actual: Tensor, expected: Tensor, share: float) -> None:
    """Equal to within a share of the range of the expected numbers, or nearly 0 if all of them are rounding errors."""
    span = max(float(expected.amax() - expected.amin()), float(expected.abs().amax()))
    assert actual.shape == expected.shape and float((actual - expected).abs().amax()) <= share * span + 1e-7


@pytest.mark.parametrize(("family", "task", "side"), CASES)
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_losses_and_gradients(actual: Any, family: str, task: str, side: str, ranks: int) -> None:
    directory = actual(ranks) / f"{family} {task} {side}"
    result, gradients = torch.load(directory / "result.pt"), load_file(directory / "model.safetensors")
    given = inputs(task, side)
    expected, wanted = theirs(make(family, task), given)
    mask = torch.tensor(given["attention_mask"]).bool()
    assert_close(result["loss"], expected["loss"], 1e-5)
    if task == "classify":
        assert_close(result["logits"], expected["logits"], 1e-4)
    for name in {"tag": ["logits"], "answer": ["start_logits", "end_logits"]}.get(task, []):
        assert_close(result[name][mask], expected[name][mask], 1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, 1e-3)
    whole = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    assert_close(result["norm"], whole, 1e-4)


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_new_head_is_written_as_transformers_reads_it(family: str, task: str, tmp_path: Path) -> None:
    """With a base model in either layout; labels, problem type and dropout are read back too."""
    make(family, "language").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf" / "tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", mp_size=2)
    labels = None if task == "answer" else list(LABELS.values())
    for layout in ("hf", "meta"):
        kind = "multi_label_classification" if task == "classify" else None
        options = {"task": task, "labels": labels, "problem_type": kind, "device": "cpu", "dtype": "float32"}
        built = TaskModel.build(tmp_path / layout, **options)
        built.save(tmp_path / f"{layout} {task}")
        again = TaskModel.build(tmp_path / f"{layout} {task}", device="cpu", dtype="float32")
        assert (again.task, again.head.config) == (task, built.head.config)
        theirs = quiet_load(tmp_path / f"{layout} {task}", task)
        if labels is not None:
            assert theirs.config.id2label == LABELS and theirs.config.problem_type == kind
        tokens = torch.randint(0, 510, (1, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, actual = theirs(tokens), again.head(tokens)
        for name in ("start_logits", "end_logits") if task == "answer" else ("logits",):
            assert_close(getattr(actual, name), getattr(expected, name), 1e-5)


def test_a_saved_language_model_generates(tmp_path: Path) -> None:
    make("llama", "language").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf" / "tokenizer.model")
    TaskModel.build(tmp_path / "hf", device="cpu", dtype="float32").save(tmp_path / "out")
    quiet_load(tmp_path / "out", "language")
    one, other = (Llama.build(tmp_path / name, device="cpu", dtype="float32") for name in ("hf", "out"))
    assert one.text_completion(["ab"], 0, max_gen_len=8) == other.text_completion(["ab"], 0, max_gen_len=8)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tagger")
    make("llama", "tag").save_pretrained(directory)
    write_tokenizer(directory / "tokenizer.model")
    return directory


def test_what_a_head_can_not_do_is_refused(tagger: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "dtype": "float32"}
    with pytest.raises(LlamaError, match="has no output layer to generate with, but a head to tag texts"):
        Llama.build(tagger, **options)
    with pytest.raises(LlamaError, match="it was made to tag texts"):
        TaskModel.build(tagger, task="language", **options)
    with pytest.raises(LlamaError, match="has no head to classify texts: give labels for a new one"):
        TaskModel.build(tagger, task="classify", **options)
    with pytest.raises(LlamaError, match="task is 'sing', expected one of language, classify, tag, answer"):
        TaskModel.build(tagger, task="sing", **options)
    with pytest.raises(LlamaError, match="for which Meta's layout has no place"):
        convert(tagger, tmp_path / "meta", "meta")
    convert(tagger, tmp_path / "half", "hf", dtype=torch.bfloat16)
    assert quiet_load(tmp_path / "half", "tag").score.weight.dtype == torch.bfloat16
    with pytest.raises(LlamaError, match="isn't empty"):
        TaskModel.build(tagger, **options).save(tmp_path / "half")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is .*, expected a name for each of 0, 1, 2"),
        ({"id2label": {"0": "a", "1": "a", "2": "c"}}, "labels are .*, expected at least one name, each of them once"),
        ({"id2label": {"0": 1, "1": "a", "2": "c"}}, "id2label is .*, expected texts"),
        ({"id2label": {"0": "a"}}, r"score.weight of shape \(3, 64\), expected \(1, 64\)"),
        ({"problem_type": "poetry"}, "problem_type is 'poetry', expected one of regression"),
        ({"classifier_dropout": 2}, r"dropout is 2, expected a number in \[0, 1\)"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "missing qa_outputs.weight"),
    ],
)
def test_a_configuration_that_can_not_be(tagger: Path, tmp_path: Path, values: dict, message: str) -> None:
    shutil.copytree(tagger, tmp_path / "odd")
    config = json.loads((tagger / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(LlamaError, match=message):
        TaskModel.build(tmp_path / "odd", device="cpu", dtype="float32")


# --- batches and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [1, 9]}, "lengths are"),
        ({"lengths": [1, 0, 9]}, "lengths are"),
        ({"attention_mask": torch.ones(3, 8)}, r"attention_mask is \(3, 8\), expected \(3, 9\)"),
        ({"attention_mask": torch.zeros(3, 9)}, "attention_mask of row 0 has no tokens"),
        ({"attention_mask": torch.tensor([[1, 0, 1] * 3] * 3)}, "padding between them"),
        ({"attention_mask": torch.ones(3, 9), "lengths": [9, 9, 9]}, "drop one of them"),
        ({"labels": torch.full((3, 9), 3)}, r"a label is 3, expected -100, or a whole number in \[0, 3\)"),
    ],
)
def test_batches_that_can_not_be(tagger: Path, given: dict, message: str) -> None:
    head = TaskModel.build(tagger, device="cpu", dtype="float32").head
    with pytest.raises(LlamaError, match=message):
        head(torch.zeros(3, 9, dtype=torch.long), **given)


def test_lengths_say_what_a_mask_says(tagger: Path) -> None:
    head, given = TaskModel.build(tagger, device="cpu", dtype="float32").head, inputs("tag", "right")
    tokens, labels = torch.tensor(given["tokens"]), torch.tensor(given["labels"])
    masked = head(tokens, attention_mask=torch.tensor(given["attention_mask"]), labels=labels)
    counted = head(tokens, LENGTHS, labels=labels)
    assert torch.equal(masked.loss, counted.loss)


LOSSES = [
    (3, None, torch.tensor([2, 0, 1])),
    (3, None, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])),
    (3, "regression", torch.tensor([[0.5, 2, -1], [0, 1, 0], [1, 1.5, 0]])),
    (1, None, torch.tensor([0.5, -2.0, 3])),
    (2, "multi_label_classification", torch.tensor([[1.0, 0], [0, 0], [1, 1]])),
]


@pytest.mark.parametrize(("count", "problem_type", "labels"), LOSSES)
def test_problem_types_inferred_or_given(count: int, problem_type: str | None, labels: Tensor, tmp_path: Path) -> None:
    names = {i: f"label {i}" for i in range(count)}
    model = make("llama", "classify", id2label=names, problem_type=problem_type)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    head = TaskModel.build(tmp_path, device="cpu", dtype="float32").head
    tokens = torch.tensor(inputs("classify", "right")["tokens"])
    mask = torch.tensor(inputs("classify", "right")["attention_mask"])
    expected = model(input_ids=tokens, attention_mask=mask, labels=labels)
    actual = head(tokens, attention_mask=mask, labels=labels)
    assert_close(actual.logits.detach(), expected.logits.detach(), 1e-5)
    assert_close(actual.loss.detach(), expected.loss.detach(), 1e-5)


def test_a_language_loss_holds_the_logits_of_few_positions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loss is the same with chunks of any size, and no chunk's logits are kept for the gradient."""
    make("llama", "language").save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    built = TaskModel.build(tmp_path, device="cpu", dtype="float32")
    tokens = torch.randint(0, 510, (2, 40), generator=torch.Generator().manual_seed(1))
    largest = []

    def loss_in(size: int) -> tuple[float, Tensor]:
        monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 512 * size)
        built.head.zero_grad()
        shapes: list[int] = []

        def keep(x: Tensor) -> Tensor:
            shapes.append(x.numel() if x.shape[-1:] == (512,) and x.ndim == 2 and x.is_floating_point() else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = built.head(tokens, labels=tokens)
        largest.append(max(shapes))
        loss.backward()
        return loss.item(), built.model.norm.weight.grad.clone()

    whole, gradient = loss_in(1000)
    for size in (1, 7, 78):
        value, own = loss_in(size)
        assert value == pytest.approx(whole, rel=1e-6)
        assert_close(own, gradient, 1e-5)
    assert largest == [0] * 4, "logits were kept for the gradient"


def test_nothing_to_learn_is_no_number(tmp_path: Path) -> None:
    make("llama", "language").save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    head = TaskModel.build(tmp_path, device="cpu", dtype="float32").head
    assert head(torch.ones(1, 4, dtype=torch.long), labels=torch.full((1, 4), -100)).isnan()


# --- with an adapter --------------------------------------------------------------------------------------------------


def test_an_adapter_is_kept_apart_and_saved_merged(tagger: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "dtype": "float32"}
    built, plain = TaskModel.build(tagger, **options), TaskModel.build(tagger, **options)
    add_lora(built.model, Lora(4, 8, ("wq", "w2")), seed=1)
    chance = torch.Generator().manual_seed(2)
    for parameter in (*lora_parameters(built.model).values(), *built.head.score.parameters()):
        parameter.data.normal_(std=0.2, generator=chance)  # as large as W: of larger ones attention is ill-conditioned
    head = {name: tensor.data for name, tensor in built.head.named_parameters() if name.startswith("score")}
    save_adapter(built.model, tmp_path / "adapter", extra=head, task_type="TOKEN_CLS")
    apart = TaskModel.build(tagger, adapter_dir=tmp_path / "adapter", **options)
    apart.save(tmp_path / "merged")
    merged = TaskModel.build(tmp_path / "merged", **options)
    tokens = torch.randint(0, 510, (2, 12), generator=chance)
    with torch.no_grad():
        expected, *actual, without = (one.head.eval()(tokens).logits for one in (built, apart, merged, plain))
    for logits in actual:
        assert_close(logits, expected, 1e-5)
    assert float((without - expected).abs().max()) > 0.1
    with pytest.raises(LlamaError, match=r"has score\.bias, which is of another task's head: expected none"):
        make("llama", "language").save_pretrained(tmp_path / "base")
        write_tokenizer(tmp_path / "base" / "tokenizer.model")
        TaskModel.build(tmp_path / "base", adapter_dir=tmp_path / "adapter", **options)
    with pytest.raises(LlamaError, match=r"score.bias of shape \(3,\), expected \(2,\): give the labels"):
        TaskModel.build(tagger, task="tag", labels=["O", "X"], adapter_dir=tmp_path / "adapter", **options)
