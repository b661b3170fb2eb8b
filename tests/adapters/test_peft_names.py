"""Families with names of their own, bases in other formats, and quantized bases: adapters are read and written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from peft_models import IDS, Made, change_tensors, make_adapter, write_base
from safetensors.torch import load_file, save_file

from llama import Llama, Lora, TaskModel, TrainingConfig, Transformer, finetune, load_adapter, save_adapter
from llama.adapters.lora import LoraLinear, add_lora, lora_parameters, merge_lora
from llama.checkpoints.convert import convert
from llama.checkpoints.families import FAMILIES, LLAMA
from llama.parallel import Place

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
NAMES = {"layers": "h", "tok_embeddings": "wte", "output": "to_words"}
NAMES |= {"attention.wq": "attn.query", "feed_forward.w2": "mlp.out"}
MINE = replace(LLAMA, model_type="mine", class_stem="Mine", label="My own", tensor_names=NAMES)
RENAMED = ((".layers.", ".h."), ("embed_tokens", "wte"), ("lm_head", "to_words"))
RENAMED += (("self_attn.q_proj", "attn.query"), ("down_proj", "out"))
TARGETS = ["q_proj", "down_proj", "lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def base(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=TARGETS)


def rename(name: str) -> str:
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def rename_file(source: Path, target: Path) -> None:
    save_file({rename(name): tensor for name, tensor in load_file(source).items()}, target, metadata={"format": "pt"})


@pytest.fixture
def renamed(base: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(base, adapter) of a family whose modules have other names, equal in all else."""
    mine, adapter = tmp_path / "mine", tmp_path / "adapter"
    mine.mkdir(), adapter.mkdir()
    rename_file(base / "model.safetensors", mine / "model.safetensors")
    (mine / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"model_type": "mine"}
    (mine / "config.json").write_text(json.dumps({**config, "architectures": ["MineForCausalLM"]}))
    rename_file(made.directory / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    config = json.loads((made.directory / "adapter_config.json").read_text())
    config["target_modules"] = [rename(f".{name}")[1:].replace("q_proj", "query") for name in TARGETS]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(FAMILIES, "mine", MINE)
    return mine, adapter


def build(ckpt_dir: Path, adapter_dir: Path | None = None, **options: str) -> Llama:
    return Llama.build(ckpt_dir, adapter_dir=adapter_dir, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


@torch.no_grad()
def logits_of(ckpt_dir: Path, adapter_dir: Path | None = None, **options: str) -> torch.Tensor:
    return build(ckpt_dir, adapter_dir, **options).model(IDS)


def test_a_family_keeps_its_names(renamed: tuple[Path, Path], made: Made, tmp_path: Path) -> None:
    """Read by its base's family or by the file's own names, and written so again."""
    mine, adapter = renamed
    assert_close(logits_of(mine, adapter), made.logits, 2e-5)
    task = TaskModel.build(mine, adapter_dir=adapter, device="cpu", dtype="float32")
    assert_close(task.model(IDS).detach(), made.logits, 2e-5)
    model = build(mine).model
    load_adapter(model, adapter)
    assert_close(model(IDS).detach(), made.logits, 2e-5)
    save_adapter(model, tmp_path / "again")
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == names
    assert_close(logits_of(mine, tmp_path / "again"), made.logits, 2e-5)


def test_what_is_trained_has_the_familys_names(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    mine, _ = renamed
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n')
    lora = Lora(2, 4, ("wq", "w2"))
    config = TrainingConfig("language", str(tmp_path / "data.jsonl"), str(tmp_path / "out"), epochs=1, lora=lora)
    finetune(config, mine, device="cpu", dtype="float32")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["out", "query"]
    names = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.h.1.attn.query.lora_A.weight" in names and len(names) == 8
    assert_close(logits_of(mine, tmp_path / "out" / "adapter"), logits_of(tmp_path / "out"), 2e-5)
    model = build(mine).model
    add_lora(model, lora, seed=1)
    save_adapter(model, tmp_path / "saved", family=MINE)
    assert load_file(tmp_path / "saved" / "adapter_model.safetensors").keys() == names.keys()


def test_a_base_in_metas_layout(base: Path, made: Made, tmp_path: Path) -> None:
    convert(base, tmp_path / "meta", "meta", mp_size=2)
    assert_close(logits_of(tmp_path / "meta", made.directory), made.logits, 2e-5)


def test_quantized_while_loading_is_the_merged_model_quantized(base: Path, made: Made, tmp_path: Path) -> None:
    TaskModel.build(base, adapter_dir=made.directory, device="cpu", dtype="float32").save(tmp_path / "merged")
    for quantization in ("int8", "int4"):
        actual = logits_of(base, made.directory, quantization=quantization)
        assert_close(actual, logits_of(tmp_path / "merged", quantization=quantization), 1e-4)


def test_a_base_that_is_stored_quantized(made: Made, base: Path, tmp_path: Path) -> None:
    """Its matrices are dequantized, the adapter is added, and what it changed is quantized again."""
    wide = write_base(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    convert(wide, tmp_path / "int8", "hf", quantization="int8")
    convert(tmp_path / "int8", tmp_path / "plain", "hf")
    adapter = make_adapter(tmp_path / "plain", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    task = TaskModel.build(tmp_path / "int8", adapter_dir=adapter.directory, device="cpu", dtype="float32")
    assert_close(task.model(IDS).detach(), adapter.logits, 2e-5)
    llama = build(tmp_path / "int8", adapter.directory)
    assert_close(llama.model(IDS).detach(), adapter.logits, 0.05)
    convert(tmp_path / "int8", tmp_path / "dense", "meta")
    assert_close(logits_of(tmp_path / "dense", adapter.directory), adapter.logits, 2e-5)


def test_an_adapter_on_a_packed_model_is_an_edit_that_packs_again(base: Path, made: Made) -> None:
    """Put on, merged, and another one put on: the cached passes follow."""
    for quantization, share in ((None, 2e-5), ("int8", 0.05)):
        model = build(base, **({} if quantization is None else {"quantization": quantization})).model
        with torch.no_grad():
            model(IDS, 0)
            load_adapter(model, made.directory)
            assert_close(model(IDS, 0), made.logits, share)
            merge_lora(model)
            assert_close(model(IDS, 0), made.logits, share)
            plain = Transformer(model.params).eval()
            plain.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
            before = plain(IDS, 0)
            add_lora(model, Lora(2, 4, ("wo",)), seed=1)
            assert_close(model(IDS, 0), before, 2e-5)  # it computes as a plain model, which rounds nothing to 8 bits
            for name, parameter in lora_parameters(model).items():
                parameter.fill_(0.1 if name.endswith("lora_B") else 0.05)
            apart = model(IDS, 0)
            merge_lora(model)
            assert not any(isinstance(module, LoraLinear) for module in model.modules())
            assert_close(model(IDS, 0), apart, max(share, 1e-4))
            assert float((apart - before).abs().max()) > 0.05


def test_adapters_in_bfloat16_on_a_base_in_bfloat16(made: Made, base: Path, tmp_path: Path) -> None:
    """What convert writes without a dtype keeps the base's."""
    from llama.adapters.opening import open_adapted

    convert(base, tmp_path / "base", "hf", dtype="bfloat16")
    directory = tmp_path / "adapter"
    directory.mkdir()
    for path in made.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    change_tensors(directory, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    convert(open_adapted(tmp_path / "base", directory), tmp_path / "merged", "hf")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert_close(logits_of(tmp_path / "merged"), made.logits, 0.05)
    assert_close(logits_of(tmp_path / "base", directory), made.logits, 0.05)
