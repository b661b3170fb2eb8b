"""Where an adapter and its base are found, whose tokenizer counts, and what the commands do with both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from peft_models import IDS, Made, change_config, make_adapter, write_base
from tiny import run_program

from llama import Llama, LlamaError, Lora, TaskModel, TrainingConfig, finetune, inspect
from llama.adapters.opening import survey_adapted
from llama.checkpoints.inspect import report_on
from llama.parallel import Place

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def originals(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the base in `base`, and an adapter in `adapter`."""
    directory = tmp_path_factory.mktemp("originals")
    make_adapter(write_base(directory / "base"), directory / "adapter", use_dora=True)
    return directory


@pytest.fixture(scope="module")
def made(originals: Path, place: Place) -> Made:
    logits = build(originals / "base", adapter_dir=originals / "adapter").model(IDS).detach()
    return Made(originals / "adapter", logits)


@pytest.fixture
def here(originals: Path, tmp_path: Path) -> Path:
    """A copy of `originals` in which everything may be changed. The adapter names no base."""
    shutil.copytree(originals, tmp_path / "here")
    change_config(tmp_path / "here" / "adapter", base_model_name_or_path=None)
    return tmp_path / "here"


def build(ckpt_dir: Any, **options: Any) -> Llama:
    return Llama.build(ckpt_dir, device="cpu", dtype="float32", **options)


@torch.no_grad()
def assert_adapted(model: Llama | TaskModel, made: Made) -> None:
    assert_close(model.model(IDS), made.logits, 1e-5)


def test_an_adapters_own_directory_names_its_base(here: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, beside the adapter, inside of its directory, or from where the program runs."""
    adapter = here / "adapter"
    monkeypatch.chdir(here.parent)
    for name in (str(here / "base"), "base", "../base", "./base", "here/base"):
        change_config(adapter, base_model_name_or_path=name)
        assert_adapted(build(adapter), made)
        assert_adapted(build(str(adapter), adapter_dir=adapter), made)
        assert_adapted(TaskModel.build(adapter, device="cpu", dtype="float32"), made)
    shutil.move(here / "base", adapter / "inner")
    change_config(adapter, base_model_name_or_path="inner")
    assert_adapted(build(adapter), made)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-llama/Llama-3.1-8B", "is 'meta-llama/Llama-3.1-8B', and there is no such directory in .*: download"),
        (None, "is None, expected the base's directory: give the base's directory as ckpt_dir, and adapter_dir=.*"),
        ("", "base_model_name_or_path is '', expected"),
        (["base"], r"base_model_name_or_path is \['base'\], expected"),
        (".", "expected params.json .* found adapter, base"),
        ("other", "'other', which holds an adapter itself"),
        ("nothing", "found an empty directory"),
    ],
)
def test_a_base_that_is_not_here_is_refused(here: Path, name: Any, message: str) -> None:
    shutil.copytree(here / "adapter", here / "other")
    (here / "nothing").mkdir()
    change_config(here / "adapter", base_model_name_or_path=name)
    with pytest.raises(LlamaError, match=message) as caught:
        build(here / "adapter")
    assert "\n" not in str(caught.value)


def test_other_mistakes(here: Path, made: Made) -> None:
    for wrong, message in ((here / "base", "adapter_config.json is missing"), (5, "adapter_dir is 5"), ("", "missing")):
        with pytest.raises(LlamaError, match=message):
            build(here / "base", adapter_dir=wrong)
    with pytest.raises(LlamaError, match=r"holds an adapter .* and no model: give the directory of its base"):
        inspect(here / "adapter")
    both = shutil.copytree(here / "base", here / "both")
    for path in (here / "adapter").iterdir():
        if path.name != "README.md":
            shutil.copy(path, both)
    with pytest.raises(LlamaError, match=r"holds a model \(config.json, model.safetensors\) and an adapter"):
        build(both)
    assert_adapted(build(both, adapter_dir=both), made)


def test_the_adapters_tokenizer_comes_first(here: Path, made: Made) -> None:
    """The stop tokens are the base's nevertheless, as in transformers, whose settings of generation are the base's."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    base = here / "base"
    for folder, template, eos in ((base, "of the base", "<a>"), (here / "adapter", "of the adapter", "<b>")):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<a>", "<b>")])
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        fast.chat_template = template
        fast.save_pretrained(folder)
    (base / "tokenizer.model").unlink()
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    llama = build(base, adapter_dir=here / "adapter")
    assert llama.tokenizer.chat_template == "of the adapter"
    assert (llama.tokenizer.eos_id, llama.tokenizer.stop_tokens) == (llama.tokenizer.special_tokens["<b>"], {7})
    assert build(base).tokenizer.chat_template == "of the base"


@pytest.mark.slow
def test_commands(here: Path, made: Made) -> None:
    base, adapter = str(here / "base"), str(here / "adapter")
    change_config(Path(adapter), base_model_name_or_path="base")
    expected = build(base, adapter_dir=adapter).text_completion(["hello"], temperature=0, max_gen_len=12)[0][
        "generation"
    ]
    answer = ("complete", "hello", "--temperature", "0", "--max_gen_len", "12", "--dtype", "float32", "--device", "cpu")
    assert build(base).text_completion(["hello"], temperature=0, max_gen_len=12)[0]["generation"] != expected
    for options in (
        ("--ckpt_dir", base, "--adapter_dir", adapter),
        ("--ckpt_dir", adapter),
        ("--adapter_dir", adapter),
    ):
        done = run_program("-m", "llama", *answer, *options)
        assert done.stdout == expected + "\n", done.stderr
    done = run_program("-m", "llama", "convert", base, str(here / "out"), "--adapter_dir", adapter, "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert_adapted(build(here / "out"), made)
    done = run_program(
        "-m", "llama", "convert", base, str(here / "adapter" / "out"), "--adapter_dir", adapter, "--to", "hf"
    )
    assert "lie in each other" in done.stderr


def test_inspect(here: Path) -> None:
    change_config(here / "adapter", base_model_name_or_path="base")
    for places in ((here / "adapter",), (here / "base", here / "adapter")):
        report = report_on(survey_adapted(*places))
        assert report.ok and report.adapter == str(here / "adapter") and "adapter      " in report.as_text()
    change_config(here / "adapter", r=5)
    report = report_on(survey_adapted(here / "adapter"))
    assert not report.ok and "expected (5, 32)" in report.problems[0]


def test_an_adapter_is_trained_further(here: Path, made: Made) -> None:
    """Its own A, B and magnitudes, and the file has them for peft; a base of the same weights is left as it is."""
    records = here / "data.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two", "three four")))
    options = {"task": "language", "data": str(records), "epochs": 1, "batch_size": 2, "learning_rate": 1e-2}
    before = TaskModel.build(here / "base", adapter_dir=here / "adapter", device="cpu", dtype="float32")
    for name, ckpt_dir, config in (
        (
            "pair",
            here / "base",
            TrainingConfig(**options, output=str(here / "pair"), adapter_dir=str(here / "adapter")),
        ),
        ("own", here / "adapter", TrainingConfig(**options, output=str(here / "own"))),
    ):
        change_config(here / "adapter", base_model_name_or_path="base")
        finetune(config, ckpt_dir, device="cpu", dtype="float32")
        merged = build(here / name).model(IDS).detach()
        assert float((merged - made.logits).abs().max()) > 1e-3
        again = TaskModel.build(here / "base", adapter_dir=here / name / "adapter", device="cpu", dtype="float32")
        assert_close(again.model(IDS).detach(), merged, 1e-5)
        for parameter, tensor in before.model.named_parameters():
            same = torch.equal(again.model.get_parameter(parameter), tensor)
            assert same == ("lora_" not in parameter)
    with pytest.raises(LlamaError, match="lora and adapter_dir were both given"):
        TrainingConfig(**options, output="x", adapter_dir="y", lora=Lora())
