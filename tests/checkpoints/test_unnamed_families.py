"""A config.json that names no known family: read where it is Llama by another name, refused where it only looks so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from against_transformers import (
    TOKENS,
    assert_same_logits,
    edit_config,
    edit_tensors,
    logits_here,
    logits_of_transformers,
    write_model,
    write_tokenizer_json,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama import LlamaError
from llama.checkpoints.convert import convert
from llama.checkpoints.families import FAMILIES
from llama.checkpoints.inspect import inspect
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.unnamed_families import LOOKALIKES
from llama.parallel import Place

YI = {"model_type": "Yi", "architectures": ["YiForCausalLM"], "auto_map": {"AutoModel": "modeling_yi.YiModel"}}


def refusal(directory: Path) -> str:
    with pytest.raises(LlamaError) as error:
        open_checkpoint(directory)
    return str(error.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "ministral"])
def test_architectures_tell_where_model_type_is_missing(
    family: str, tmp_path: Path, place: Place, capsys: pytest.CaptureFixture
) -> None:
    expected = logits_of_transformers(write_model(tmp_path, family, head_dim=16))
    assert_same_logits(edit_config(tmp_path, model_type="drop"), place, expected)
    assert "config.json has no model_type: read as" in capsys.readouterr().err
    stem = FAMILIES[family].class_stem
    edit_config(tmp_path, architectures=[f"{stem}ForSequenceClassification"], model_type="drop")
    assert "missing score.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "config", "edits"),
    [
        ("llama", {}, YI),
        ("llama", {"attention_bias": True}, {**YI, "model_type": "internlm", "attention_bias": "drop", "bias": True}),
        ("llama", {"mlp_bias": True}, {"model_type": "aquila", "architectures": ["AquilaForCausalLM"]}),
        ("llama", {"tie_word_embeddings": True}, {**YI, "head_dim": "drop"}),
        ("qwen2", {}, {"model_type": "my_qwen", "architectures": ["MyModelForCausalLM"]}),
        ("qwen3", {"head_dim": 16}, {"model_type": "mine", "architectures": "drop"}),
        ("llama", {}, {"model_type": "custom_llama"}),  # with LlamaForCausalLM
        ("llama", {}, {"model_type": "drop", "architectures": ["YiForCausalLM"]}),
    ],
)
def test_the_tensors_tell_for_other_names(
    family: str, config: dict[str, Any], edits: dict[str, Any], tmp_path: Path, place: Place, capsys: Any
) -> None:
    expected = logits_of_transformers(write_model(tmp_path / "model", family, **config))
    window = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    edit_config(tmp_path / "model", **dict.fromkeys(window, "drop"), **edits)
    assert_same_logits(tmp_path / "model", place, expected)
    assert "read as " in capsys.readouterr().err
    report = inspect(tmp_path / "model")
    assert len(report.notes) == 1 and "read as " in report.as_text()
    write_tokenizer_json(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "again", "hf")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] in FAMILIES and "auto_map" not in written
    assert_same_logits(tmp_path / "again", place, expected)
    assert_same_logits(tmp_path / "again", place)


def test_norms_as_in_yis_first_release(tmp_path: Path, place: Place) -> None:
    expected = logits_of_transformers(write_model(tmp_path, "llama"))
    edit_config(tmp_path, **YI)
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}

    def rename(name: str) -> str:
        return next((name.replace(old, new) for old, new in names.items() if old in name), name)

    edit_tensors(tmp_path, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert_same_logits(tmp_path, place, expected)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({**YI, "model_type": "granite"}, "model_type is 'granite', expected one of llama"),
        ({"model_type": "gemma"}, "model_type is 'gemma', expected one of llama"),
        ({**YI, "embedding_multiplier": 12.0}, "isn't Llama under another name, since it has 'embedding_multiplier'"),
        ({**YI, "sliding_window": 4}, "since it has 'sliding_window'"),
        ({**YI, "rms_norm_eps": "drop"}, "to be read as Llama it needs rms_norm_eps"),
        ({**YI, "rope_parameters": "drop"}, "to be read as Llama it needs rope_theta"),
        ({"model_type": "drop", "architectures": "drop"}, "model_type is None, expected one of"),
        ({"model_type": None, "architectures": [3]}, "model_type is None, expected one of"),
        ({"model_type": {}, "architectures": ["LlamaForCausalLM"]}, "model_type is {}, expected one of"),
        ({**YI, "hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_may_be_another_network_is_refused(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(edit_config(write_model(tmp_path, "llama"), **edits))


def test_tensors_that_are_not_llamas_are_named(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    edit_tensors(edit_config(tmp_path, **YI), lambda tensors: {**tensors, "model.layers.0.extra.weight": torch.ones(1)})
    assert "surplus model.layers.0.extra.weight" in refusal(tmp_path)


@pytest.mark.slow
def test_every_family_of_transformers_that_looks_like_llama_is_known(tmp_path: Path, place: Place) -> None:
    """Whatever would be read by its tensors computes what transformers computes, or is listed."""
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    same = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name](**sizes)
            with torch.device("meta"):
                names = AutoModelForCausalLM.from_config(config).state_dict().keys()
        except Exception:
            continue  # it needs other sizes, or other packages
        if not {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"} <= names or name in FAMILIES:
            continue
        if len(names) > 40:  # experts
            continue
        directory = tmp_path / name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(directory)
        try:
            found = logits_here(directory, place)
        except LlamaError:
            continue
        with torch.no_grad():
            expected = model(input_ids=TOKENS, use_cache=False).logits
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name
        same.add(name)
    assert same and not same & LOOKALIKES
