"""Adapter directories that are damaged, or belong to another model, are refused by name."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import torch
from conftest import Twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import ARGS, CONFIG, ROOT, TENSORS, adapted
from torch import Tensor

from llama import LlamaError, ModelArgs, Transformer
from llama.adapters import peft as adapter
from llama.adapters.lora import LoraLinear
from llama.adapters.peft import load_adapter, save_adapter
from llama.parallel import Place

twin = tiny_adapters.twin
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what peft asks of models
Tensors, Config = dict[str, Tensor], dict[str, Any]


def changed(**keys: Any) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config.update(keys)


def renamed(old: str, new: str) -> Callable[[Tensors, Config], None]:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def put(key: str, tensor: Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: tensors.update({key: tensor})


A, B = (f"{ROOT}.1.self_attn.q_proj.lora_{x}.weight" for x in "AB")
BAD: list[tuple[Callable[[Tensors, Config], None], str]] = [
    (lambda tensors, config: tensors.pop(B), f"{TENSORS}.*missing {B}"),
    (lambda tensors, config: [tensors.pop(key) for key in (A, B)], f"missing {A}; missing {B}"),
    (lambda tensors, config: (tensors.clear(), config.update(target_modules=".*"))[0], "no layer has an adapter"),
    (put(A, torch.ones(3, 64)), rf"{A} of shape \(3, 64\), expected \(4, 64\)"),
    (put(B, torch.ones(32, 4)), rf"{B} of shape \(32, 4\), expected \(64, 4\)"),
    (put(A, torch.ones(())), rf"{A} of shape \(\), expected \(4, 64\)"),
    (put(A, torch.ones(4, 64, dtype=torch.int8)), f"{A} of torch.int8"),
    (put(A.replace(".1.", ".2."), torch.ones(4, 64)), r"surplus .*layers\.2\.self_attn"),
    (put("base_model.model.score.weight", torch.ones(2, 64)), "surplus .*score"),
    (renamed(A, A.removeprefix("base_model.model.")), "surplus .*missing"),
    (renamed(A, A.replace("q_proj", "c_attn")), "surplus .*c_attn.*missing"),
    (put(A.replace("lora_A", "lora_magnitude_vector"), torch.ones(64)), "surplus .*magnitude"),
    (changed(peft_type="IA3"), f"{CONFIG}: peft_type is 'IA3', expected 'LORA'"),
    (changed(peft_type=None), "peft_type is None"),
    (changed(use_dora=True), "missing .*q_proj.lora_magnitude_vector"),
    (changed(fan_in_fan_out=True), "fan_in_fan_out.*plain LoRA"),
    (changed(a_feature_to_come={"x": 1}), "a_feature_to_come.*plain LoRA"),
    (changed(bias="some"), "bias is 'some', expected 'none'"),
    (changed(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    (changed(r=8), r"of shape \(4, 64\), expected \(8, 64\)"),
    (changed(r="4"), "r is '4', expected a whole number"),
    (changed(r=None), "r is None"),
    (changed(lora_alpha=0), "lora_alpha is 0"),
    (changed(lora_alpha=None), "lora_alpha is None"),
    (changed(lora_dropout=1.0), "lora_dropout is 1.0"),
    (changed(target_modules=["query"]), "target_modules has 'query', expected names such as .*q_proj"),
    (changed(target_modules=["q_proj", "v_proj", "k_proj"]), "missing .*k_proj"),
    (changed(target_modules="all-linear"), "missing .*; and [0-9]+ more problems"),
    (changed(target_modules=[3]), "target_modules has 3"),
    (changed(target_modules=None), "target_modules is None"),
    (changed(rank_pattern={"(q_proj": 4}), "rank_pattern has '.*unterminated"),
    (changed(rank_pattern={"q_proj": 0}), "r is 0"),
    (changed(rank_pattern={"q_proj": 10**400}, use_rslora=True), "r is 1000"),
    (changed(rank_pattern=[4]), "rank_pattern is .4., expected a dict"),
    (changed(modules_to_save="score"), "modules_to_save is 'score', expected a list"),
]


@pytest.fixture(scope="module")
def good(twin: Twin, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Config]:
    directory = tmp_path_factory.mktemp("good")
    save_adapter(adapted(twin, "wq", "wv"), directory)
    return load_file(directory / TENSORS), json.loads((directory / CONFIG).read_text())


def write(directory: Path, tensors: Tensors, config: object) -> Path:
    save_file(tensors, directory / TENSORS)
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_adapters(twin: Twin, good: tuple[Tensors, Config], tmp_path: Path, case: int) -> None:
    """Refused in one line that names what was found and expected. The model stays as it was."""
    (edit, message), (tensors, config) = BAD[case], copy.deepcopy(good)
    edit(tensors, config)
    assert_refused(twin, write(tmp_path, tensors, config), message)


def assert_refused(twin: Twin, directory: Path, message: str) -> None:
    model = copy.deepcopy(twin.ours)
    with pytest.raises(LlamaError, match=message) as caught:
        load_adapter(model, directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_bad_files(twin: Twin, good: tuple[Tensors, Config], tmp_path: Path) -> None:
    assert_refused(twin, tmp_path / "nowhere", f"found nothing there, expected an adapter.s directory, with {CONFIG}")
    write(tmp_path, *good)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-100])
    assert_refused(twin, tmp_path, f"{TENSORS} is truncated")
    (tmp_path / TENSORS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(twin, tmp_path, "git lfs pull")
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    assert_refused(twin, tmp_path, f"{TENSORS} is missing.*adapter_model.bin is the older form")
    (tmp_path / TENSORS).write_bytes(whole)
    for text in ("", "[]", "{", '{"peft_type": "LORA"}'):
        (tmp_path / CONFIG).write_text(text)
        assert_refused(twin, tmp_path, CONFIG)


def test_another_models_adapter(place: Place, good: tuple[Tensors, Config], tmp_path: Path) -> None:
    wider = Twin(Transformer(ModelArgs(96, 2, 8, 2, 128, 32)), None)  # type: ignore[arg-type]
    assert_refused(wider, write(tmp_path, *good), r"lora_A.weight of shape \(4, 64\), expected \(4, 96\)")
    deeper = Twin(Transformer(ModelArgs(64, 3, 8, 2, 128, 32)), None)  # type: ignore[arg-type]
    assert_refused(deeper, tmp_path, re.escape(f"missing {ROOT}.2.self_attn.q_proj.lora_A.weight"))


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES |= st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=5), VALUES, max_size=2)
KEYS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "bias"]
KEYS += ["rank_pattern", "alpha_pattern", "init_lora_weights", "task_type", "layers_to_transform", "use_dora", "other"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_configuration_is_read_or_refused(
    good: tuple[Tensors, Config], tmp_path: Path, values: dict[str, Any]
) -> None:
    tensors, config = good
    try:
        actual = adapter.read_adapter(write(tmp_path, tensors, {**config, **values}), ARGS)
    except LlamaError:
        return
    assert actual.sizes.keys() == {f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wv")}
    assert all(stored.shape in ((4, 64), (64, 4), (16, 4)) for stored in actual.tensors.values())
