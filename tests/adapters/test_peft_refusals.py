"""Every field of peft's LoraConfig is honoured or refused by its name; files that don't fit say which tensor."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from peft_models import IDS, Made, change_config, change_tensors, make_adapter, reload_logits, write_base
from torch import Tensor

from llama import Llama, LlamaError, ModelArgs
from llama.adapters.peft_config import IGNORED, READ, REFUSED
from llama.adapters.reading import read_adapter
from llama.parallel import Place

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ROOT = "base_model.model"
Q = "model.layers.0.self_attn.q_proj"
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def base(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_adapter(base, tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy, in which everything may be changed."""
    return Made(Path(shutil.copytree(original.directory, tmp_path / "adapter")), original.logits)


def build(base: Path, adapter: Path) -> Llama:
    return Llama.build(base, adapter_dir=adapter, device="cpu", dtype="float32")


def test_every_field_of_pefts_is_known() -> None:
    """A field that a new peft adds is refused where it is set, until somebody has looked at what it computes."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert (
        fields == READ | IGNORED | REFUSED.keys() and not (READ & IGNORED) and not ((READ | IGNORED) & REFUSED.keys())
    )


SET: dict[str, Any] = {
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [3, 4],
    "layer_replication": [[0, 2], [1, 2]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "fan_in_fan_out": True,
    "a_field_to_come": {"x": 1},
}


@pytest.mark.parametrize("key", SET)
def test_what_cannot_be_honoured_is_refused_by_name(base: Path, made: Made, key: str) -> None:
    change_config(made.directory, **{key: SET[key]})
    with pytest.raises(LlamaError, match=rf"adapter_config.json: .*{key}.* is .*expected null or false.*merge"):
        build(base, made.directory)
    for off in (None, False, [], {}):
        change_config(made.directory, **{key: off})
        assert_close(build(base, made.directory).model(IDS).detach(), made.logits)


assert SET.keys() - {"a_field_to_come"} == REFUSED.keys()


@pytest.mark.parametrize("kind", ["ADALORA", "IA3", "LOHA", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "VERA", "XLORA"])
def test_other_types_are_refused(base: Path, made: Made, kind: str) -> None:
    change_config(made.directory, peft_type=kind)
    with pytest.raises(LlamaError, match=f"peft_type is '{kind}', expected 'LORA'.*merge_and_unload"):
        build(base, made.directory)


@pytest.mark.parametrize("start", ["pissa_niter_16", "loftq", "corda", "lora_ga", "other", 3])
def test_starts_that_change_the_base_for_good(base: Path, made: Made, start: Any) -> None:
    """peft can't compute such a base again either, unless it converts the adapter while saving it."""
    change_config(made.directory, init_lora_weights=start)
    with pytest.raises(
        LlamaError, match=rf"init_lora_weights is '?{start}'?, .*path_initial_model_for_weight_conversion"
    ):
        build(base, made.directory)


def test_a_converted_pissa_adapter_is_plain(base: Path, tmp_path: Path) -> None:
    """By peft's own way of saving one: twice the rank, on the base as it is."""
    import transformers

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    change_config(tmp_path / "start", init_lora_weights=True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.05
        expected = theirs(input_ids=IDS, use_cache=False).logits
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(build(base, tmp_path / "plain").model(IDS).detach(), expected)


Tensors = dict[str, Tensor]


def put(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{ROOT}.{key}": torch.zeros(shape)})


FILES: list[tuple[dict[str, Any], Callable[[Tensors], Any], str]] = [
    ({"use_dora": True}, lambda t: None, "missing .*q_proj.lora_magnitude_vector"),
    ({"use_dora": True, "lora_bias": True}, lambda t: None, "lora_bias is True, expected false, since use_dora"),
    ({"lora_bias": True}, lambda t: None, "missing .*q_proj.lora_B.bias"),
    (
        {},
        put("model.layers.0.self_attn.q_proj.lora_B.bias", 32),
        "surplus .*lora_B.bias', which adapter_config.json doesn",
    ),
    ({}, put("model.layers.0.self_attn.k_proj.lora_A.weight", 4, 32), "surplus .*k_proj.lora_A.*doesn't ask for"),
    ({}, put("model.layers.0.self_attn.q_proj.lora_diag", 4), "surplus .*lora_diag"),
    (
        {"use_dora": True},
        put("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 31),
        r"\(31,\), expected \(32,\)",
    ),
    ({"modules_to_save": ["lm_head"]}, lambda t: None, "missing base_model.model.lm_head.weight"),
    ({"modules_to_save": ["norm"]}, lambda t: None, "missing .*input_layernorm.weight; missing .*post_attention"),
    ({"modules_to_save": "norm"}, lambda t: None, "modules_to_save is 'norm', expected a list"),
    ({}, put("model.norm.weight", 31), r"norm.weight of shape \(31,\), expected \(32,\)"),
    ({"trainable_token_indices": [3]}, lambda t: None, "missing .*embed_tokens.token_adapter.trainable_tokens_delta"),
    (
        {},
        put(DELTA, 1, 32),
        r"delta of shape \(1, 32\), expected \(0,",
    ),
    (
        {"trainable_token_indices": [3, 3]},
        lambda t: None,
        r"trainable_token_indices is \[3, 3\], expected",
    ),
    (
        {"trainable_token_indices": {"wte": [3]}},
        lambda t: None,
        "token_indices is .*embed_tokens and lm_head",
    ),
    (
        {"trainable_token_indices": [600]},
        put(DELTA, 1, 32),
        "trainable_token_indices has 600, above the last word",
    ),
    ({}, put("lm_head.weight", 520, 32), "missing base_model.model.model.embed_tokens.weight, whose rows of 520 words"),
    (
        {},
        put("model.embed_tokens.weight", 520, 32),
        "missing base_model.model.lm_head.weight.*save_embedding",
    ),
    ({"target_modules": ["embed_tokens"]}, lambda t: None, "missing .*embed_tokens.lora_embedding_A"),
    (
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": "all"},
        lambda t: None,
        "layers_to_transform is 'all'",
    ),
    (
        {"target_modules": ".*proj", "layers_to_transform": [0]},
        lambda t: None,
        "target_modules is .* expected a list, since",
    ),
    ({"target_modules": "(q_proj"}, lambda t: None, r"target_modules has '\(q_proj', which can't be matched"),
    ({"exclude_modules": "*"}, lambda t: None, r"exclude_modules has '\*', which can't be matched"),
    ({"exclude_modules": 3}, lambda t: None, "exclude_modules is 3, expected a list of names, a pattern or null"),
    ({"layers_pattern": ["(h"], "layers_to_transform": [0]}, lambda t: None, r"layers_pattern has .*\(h"),
    ({"rank_pattern": {"[": 3}}, lambda t: None, "rank_pattern has .*which can't be matched"),
    ({"ensure_weight_tying": "yes"}, lambda t: None, "ensure_weight_tying is 'yes', expected true or false"),
]


@pytest.mark.parametrize("case", range(len(FILES)))
def test_files_that_do_not_fit(base: Path, made: Made, case: int) -> None:
    keys, change, message = FILES[case]
    change_tensors(change_config(made.directory, **keys), change)
    with pytest.raises(LlamaError, match=message) as caught:
        read_adapter(made.directory, ModelArgs(32, 2, 4, 2, 512, 16))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_a_head_needs_its_task(base: Path, tmp_path: Path) -> None:
    import transformers

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "head")
    with pytest.raises(LlamaError, match=r"holds a task head \(score.weight\), which only llama.TaskModel.build"):
        build(base, tmp_path / "head")


def test_an_adapter_of_a_model_without_a_head(base: Path, tmp_path: Path) -> None:
    """AutoModel's modules have no `model.` before their names; embeddings are made with such adapters."""
    import transformers

    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", target_modules=r"layers\.\d\.self_attn\.(q|k)_proj|norm.*x"
    )
    theirs = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1
        expected = theirs(input_ids=IDS, use_cache=False).last_hidden_state
        theirs.save_pretrained(tmp_path / "adapter")
        assert_close(build(base, tmp_path / "adapter").model.hidden_states(IDS), expected)


def test_peft_reads_the_base_that_the_file_holds(base: Path, made: Made) -> None:
    """Any tensor of the base's in a file takes its place, as peft has it."""
    change_tensors(made.directory, lambda t: t.update({f"{ROOT}.model.norm.weight": torch.linspace(0.5, 2, 32)}))
    assert_close(build(base, made.directory).model(IDS).detach(), reload_logits(base, made.directory))
