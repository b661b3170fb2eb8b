"""TaskModel as users call it: what is refused, the same on all ranks; what is written; unusual files."""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from tasks_program import dropouts, failures, language_losses
from tiny import write_tokenizer
from tiny_heads import ENDINGS, LABELS, NAMES, SIZES, make, quiet_load
from transformers import AutoConfig

from llama import LlamaError, TaskModel
from llama.checkpoints.convert import convert
from llama.cli.finetune import add_options
from llama.training.config import TrainingConfig
from llama.training.trainer import finetune

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
TOKENS = torch.arange(10).view(2, 5)
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each task, which tests don't change."""
    root = tmp_path_factory.mktemp("made")
    for task in ENDINGS:
        make("llama", task).save_pretrained(root / task)
        write_tokenizer(root / task / "tokenizer.model")
    return root


# --- heads that are there, and new ones -------------------------------------------------------------------------------


def test_a_problem_type_alone_keeps_the_head(made: Path, tmp_path: Path) -> None:
    """A trained head is replaced only if other labels are given."""
    kind = "multi_label_classification"
    own = TaskModel.build(made / "classify", **OPTIONS).head.score.weight
    for labels in (None, list(LABELS.values())):
        built = TaskModel.build(made / "classify", labels=labels, problem_type=kind, **OPTIONS)
        assert torch.equal(built.head.score.weight, own)
        assert built.head.config.problem_type == kind
    built.save(tmp_path / "out")
    assert quiet_load(tmp_path / "out", "classify").config.problem_type == kind
    other = TaskModel.build(made / "classify", labels=["a", "b", "c"], **OPTIONS)
    assert not torch.equal(other.head.score.weight, own)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("answer", {"labels": ["a", "b"]}, r"labels is \['a', 'b'\], expected a list of names to classify or tag by"),
        ("language", {"labels": ["a"]}, "labels is .*, expected a list of names to classify or tag by, or None"),
        ("classify", {"labels": "abc"}, "labels is 'abc', expected a list"),
        ("tag", {"labels": [1, 2]}, "labels are .1, 2., expected at least one name"),
        ("tag", {"problem_type": "regression"}, "problem_type is 'regression', expected None: the task is tag"),
        ("answer", {"problem_type": "regression"}, "problem_type is 'regression', expected None: the task is answer"),
    ],
)
def test_what_a_task_has_no_use_for(made: Path, task: str, options: dict, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        TaskModel.build(made / task, **options, **OPTIONS)


def test_who_has_no_head_says_so(made: Path) -> None:
    with pytest.raises(LlamaError, match="has no head to classify texts: build it with task='classify'"):
        TaskModel.build(made / "language", **OPTIONS).classify(["a"])


@pytest.mark.parametrize("option", [["--adapter_only"], ["--lora_alpha", "2"], ["--lora_targets", "wq"]])
def test_options_of_adapters_without_one(option: list[str]) -> None:
    command = argparse.ArgumentParser()
    add_options(command)
    options = command.parse_args(["--task", "tag", "--data", "a", "--output", "b", *option])
    with pytest.raises(LlamaError, match=f"{option[0]} was given without --lora_r"):
        options.run(options)


# --- what heads are given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("language", {"labels": torch.zeros(2, 4).long()}, r"shape \(2, 4\), expected whole numbers of shape \(2, 5\)"),
        ("language", {"labels": torch.zeros(2, 6).long()}, r"shape \(2, 6\), expected whole numbers of shape \(2, 5\)"),
        ("language", {"labels": torch.zeros(2, 5)}, "labels are torch.float32"),
        ("tag", {"labels": torch.zeros(5, 2).long()}, r"shape \(5, 2\), expected whole numbers of shape \(2, 5\)"),
        ("tag", {"labels": torch.zeros(2, 5)}, "labels are torch.float32"),
        ("classify", {"labels": torch.zeros(3).long()}, r"shape \(3,\), expected whole numbers of shape \(2,\)"),
        ("classify", {"labels": torch.ones(2).bool()}, "labels are torch.bool"),
        ("classify", {"labels": torch.zeros(3, 2)}, r"labels are \(3, 2\), expected \(2, 3\)"),
        ("classify", {"lengths": [1.5, 2]}, r"lengths are \[1.5, 2.0\], expected 2 whole numbers"),
        ("answer", {"start_positions": torch.zeros(2).long()}, "one of start_positions and end_positions"),
        (
            "answer",
            {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(1).long()},
            r"end_positions are torch.int64 of shape \(1,\), expected whole numbers of shape \(2,\)",
        ),
    ],
)
def test_labels_that_fit_no_batch(made: Path, task: str, given: dict, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        TaskModel.build(made / task, **OPTIONS).head(TOKENS, **given)


def test_tokens_that_are_no_batch(made: Path) -> None:
    with pytest.raises(LlamaError, match=r"tokens have shape \(5,\), expected \(rows, positions\)"):
        TaskModel.build(made / "classify", **OPTIONS).head(TOKENS[0])


def test_one_position_and_labels_of_fewer_bits(made: Path) -> None:
    head = TaskModel.build(made / "tag", **OPTIONS).head
    alone, padded = head(TOKENS[:1, :1]).logits, head(TOKENS, [1, 1]).logits
    assert torch.allclose(alone, padded[:1, :1], atol=1e-5)
    labels = TOKENS % 3
    assert torch.equal(head(TOKENS, labels=labels.int()).loss, head(TOKENS, labels=labels).loss)
    assert head(TOKENS, labels=torch.full((2, 5), -100)).loss.isnan()


def loss_cases() -> dict[str, dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(2)
    plain = {"h": torch.randn(2, 13, 8, generator=chance), "weight": torch.randn(24, 8, generator=chance)}
    borders = torch.tensor([0, 0, 5, 6, 11, 12, 17, 18, 23, 7, 8, 15, 16]).expand(2, -1)  # of 2, 3 and 4 ranks' words
    huge = {"h": plain["h"] * 100, "weight": plain["weight"] * 100}
    one = torch.full((2, 13), -100)
    one[1, 7] = 18
    return {
        "at borders": {**plain, "labels": borders},
        "huge logits": {**huge, "labels": borders},
        "one label": {**plain, "labels": one},
        "last position": {**plain, "labels": torch.where(torch.arange(13) == 12, 23, -100).expand(2, -1)},
    }


def test_a_language_loss_at_the_borders_of_ranks(pool: RankPool) -> None:
    """Also for logits whose exponentials overflow. The oracle is torch's loss in float64."""
    cases = loss_cases()
    ranks = pool.run(language_losses, cases, ranks=4).results
    for name, case in cases.items():
        h, weight = (case[key].double().requires_grad_() for key in ("h", "weight"))
        logits = h @ weight.T
        if name == "huge logits":
            assert float(logits.detach().abs().max()) > 1e4
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), case["labels"][:, 1:].flatten())
        loss.backward()
        for actual in ranks:
            assert actual[name]["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert torch.allclose(torch.tensor(actual[name]["h"]).double(), h.grad, rtol=1e-3, atol=1e-5)
        words = torch.tensor([row for actual in ranks for row in actual[name]["weight"]]).double()
        assert torch.allclose(words, weight.grad, rtol=1e-3, atol=1e-5)


def test_dropout_leaves_out_the_same_on_all_ranks(pool: RankPool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tag", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.5}))
    one, other = pool.run(dropouts, tmp_path, ranks=2).results
    assert one == other
    head = TaskModel.build(made / "tag", **OPTIONS).head.train()
    loss = head(torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8) % 3).loss
    loss.backward()
    assert one["evaluated"] == pytest.approx(loss.item(), rel=1e-5)
    assert not torch.allclose(torch.tensor(one["gradient"]), head.score.weight.grad, atol=1e-2), "nothing was left out"


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        ("llama", "classify", {"id2label": None, "num_labels": 2}),
        ("llama", "classify", {"id2label": None, "num_labels": 1}),
        ("llama", "classify", DYNAMIC),
        ("qwen2", "tag", WINDOW),
        ("mistral", "answer", {"sliding_window": 4}),
        ("mistral", "tag", {"sliding_window": 4}),
        ("qwen3", "answer", {"tie_word_embeddings": True}),
    ],
)
def test_an_odd_checkpoint_comes_back_as_it_was(family: str, task: str, config: dict, tmp_path: Path) -> None:
    """All tensors, settings and logits are the same. The files are shards, and the head has its own."""
    dropout = {"classifier_dropout": 0.2} if task == "tag" else {}
    kind = AutoConfig.for_model(family, **SIZES, **dropout, **config)
    torch.manual_seed(0)
    model = getattr(transformers, f"{NAMES[family]}For{ENDINGS[task]}")._from_config(kind, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    write_tokenizer(tmp_path / "in" / "tokenizer.model")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 3
    built = TaskModel.build(tmp_path / "in", **OPTIONS)
    built.save(tmp_path / "out")
    again = quiet_load(tmp_path / "out", task)
    expected, actual = model.state_dict(), again.state_dict()
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    said, kept = again.config.to_dict(), model.config.to_dict()
    ignored = {"_name_or_path", "transformers_version"}
    assert {k for k in kept if said.get(k) != kept[k]} <= ignored
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "in" / "tokenizer.model").read_bytes()
    tokens = torch.arange(24).view(1, 24)
    with torch.no_grad():
        wanted, got = model.float()(tokens), built.head(tokens)
    for name in ("start_logits", "end_logits") if task == "answer" else ("logits",):
        assert torch.allclose(getattr(got, name), getattr(wanted, name), atol=1e-4)


def test_an_output_layer_that_was_left_beside_a_head(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "classify", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.ones(512, 64)}, path, {"format": "pt"})
    one, other = (TaskModel.build(directory, **OPTIONS) for directory in (made / "classify", tmp_path / "model"))
    assert one.classify(["ab"]) == other.classify(["ab"])
    other.save(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_what_is_wrong_is_said_once(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "classify", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "id2label": []}))
    with pytest.raises(LlamaError) as actual:
        TaskModel.build(tmp_path / "model", **OPTIONS)
    assert str(actual.value).count("config.json") == 1


def test_a_head_on_a_rounded_model(tmp_path: Path) -> None:
    """It is trained and written with the dequantized numbers and the settings of the model."""
    make("llama", "language", intermediate_size=128, max_position_embeddings=48).save_pretrained(tmp_path / "whole")
    write_tokenizer(tmp_path / "whole" / "tokenizer.model")
    convert(tmp_path / "whole", tmp_path / "rounded", "hf", quantization="int8")
    built = TaskModel.build(tmp_path / "rounded", task="tag", labels=["O", "B-X"], **OPTIONS)
    built.save(tmp_path / "out")
    again = quiet_load(tmp_path / "out", "tag")
    assert (again.config.max_position_embeddings, again.config.pad_token_id) == (48, SIZES["pad_token_id"])
    with torch.no_grad():
        assert torch.allclose(again(TOKENS).logits, built.head(TOKENS).logits, atol=1e-5)
    with pytest.raises(LlamaError, match="has a task head, which isn't quantized"):
        convert(tmp_path / "out", tmp_path / "no", "hf", quantization="int8")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda root: root / "model", "model is the source itself"),
        (lambda root: root / "model" / "sub", "lie in each other"),
        (lambda root: root / "file", "is a file or a broken link"),
        (lambda root: root / "file" / "sub", r"sub can't be written \(.*Not a directory"),
        (lambda root: "https://example.org/model", "is a URL: expected a directory of this machine"),
    ],
)
def test_places_that_nothing_is_written_to(made: Path, tmp_path: Path, where: Callable, message: str) -> None:
    shutil.copytree(made / "tag", tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    built = TaskModel.build(tmp_path / "model", **OPTIONS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LlamaError, match=message):
        built.save(where(tmp_path), force=True)
    with pytest.raises(LlamaError, match=r"dtype torch.int8 is not supported"):
        built.save(tmp_path / "out", dtype=torch.int8)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_ranks_hear_what_failed_on_one(pool: RankPool, made: Path, tmp_path: Path) -> None:
    """No rank waits for one that failed, no partial file stays, and an older checkpoint is kept."""
    shutil.copytree(made / "classify", tmp_path / "model")
    shutil.copytree(made / "tag", tmp_path / "old")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    one, other = pool.run(failures, tmp_path, ranks=2).results
    assert one == other
    assert "elsewhere: found nothing there" in one["unreadable"]
    assert "taken isn't empty" in one["taken"]
    for name in ("parts", "files", "again"):
        assert "can't be written (No space left on device)" in one[name], name
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    assert not list((tmp_path / "new").iterdir())
    assert {path.name for path in (tmp_path / "old").iterdir()} == {path.name for path in (made / "tag").iterdir()}
    assert quiet_load(tmp_path / "old", "tag").config.id2label == LABELS


def test_a_head_of_bfloat16_rounds_and_no_more(made: Path) -> None:
    """About ten roundings, each by 2^-9 of a number, give a bound that a wrong layer would exceed."""
    for task in ("classify", "tag"):
        exact = TaskModel.build(made / task, **OPTIONS).head
        short = TaskModel.build(made / task, device="cpu", dtype="bfloat16").head
        with torch.no_grad():
            expected, actual = exact(TOKENS, labels=None).logits, short(TOKENS, labels=None).logits
        assert actual.dtype == torch.float32
        off = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        assert 0 < off < 10 * 2**-8, math.log2(off)


# --- memory, and tensors that are there twice -------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_it_is_loaded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TaskModel.build(made / "tag", **OPTIONS).model
    numbers = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("llama.tasks.model.load_model", None)
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda _: 4 * numbers - 1)
    with pytest.raises(LlamaError, match=r"of 4 bytes each, 1 x on cpu = .* do not fit its .*: choose a smaller dtype"):
        TaskModel.build(made / "tag", **OPTIONS)
    cache = 2 * 2 * 4 * 512 * 2 * 8 * 4  # keys and values, layers, rows, positions, heads, their numbers, bytes
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda _: 4 * numbers + cache - 1)
    with pytest.raises(LlamaError, match=r"GB of KV cache .*: lower max_seq_len or max_batch_size, or use more ranks"):
        TaskModel.build(made / "tag", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_seq_len": 0}, "max_seq_len is 0"), ({"max_batch_size": "x"}, "max_batch_size is 'x'")],
)
def test_sizes_that_are_none(made: Path, options: dict, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        TaskModel.build(made / "tag", **options, **OPTIONS)


def test_training_needs_more(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "ab", "spans": []}\n{"text": "ab", "spans": []}\n')
    numbers = sum(parameter.numel() for parameter in TaskModel.build(made / "tag", **OPTIONS).model.parameters())
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda _: 15 * numbers)
    plan = TrainingConfig("tag", str(tmp_path / "data.jsonl"), str(tmp_path / "out"), batch_size=1, max_seq_len=16)
    with pytest.raises(LlamaError, match=r"of 16 bytes each, .*: train with lora, or use more ranks"):
        finetune(plan, made / "tag", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_head_in_two_files_is_told(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tag", tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    (tmp_path / "twice" / "model.safetensors").unlink()
    places = {}
    for name, own in (("a", {**tensors}), ("b", {"score.weight": tensors["score.weight"]})):
        save_file(own, tmp_path / "twice" / f"{name}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(own, f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "twice" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LlamaError, match=r"b.safetensors has score.weight, and so has a file before it"):
        TaskModel.build(tmp_path / "twice", **OPTIONS)
