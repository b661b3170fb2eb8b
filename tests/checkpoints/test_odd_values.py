"""Every key of a configuration with values of every JSON type: what can't be is named, and nothing else is raised."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from against_transformers import write_model
from tiny import write_checkpoint, write_hf_checkpoint

from llama import LlamaError
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import inspect
from llama.checkpoints.loader import open_checkpoint

NESTED: list[Any] = []
for _ in range(50):
    NESTED = [NESTED]
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 4096, 2**31, 2**63, 10**400, -(10**400)),
    *(0.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "64", "\ud800", "\n\x1b[2J", "sliding_attention", "x" * 10_000),
    *([], [None], [1, 2], [[1], [2]], ["full_attention", ["x"]], [{}, {}], {}, {"a": 1}, {"0": "x", "1": []}, NESTED),
]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KEYS = [
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias"),
    *("mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "quantization_config"),
    *("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "eos_token_id", "torch_dtype"),
    *("original_max_position_embeddings", "partial_rotary_factor", "dtype", "bos_token_id", "auto_map"),
]
ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
ROPE |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": None}
ROPE |= {"truncate": True, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "type": None, "partial_rotary_factor": 1.0}


def assert_named(directory: Path, why: object, act: Callable[[Path], object] = open_checkpoint) -> str | None:
    """Whatever is wrong is a LlamaError of one printable line of a length that can be read."""
    try:
        act(directory)
    except LlamaError as e:
        assert str(e).isprintable() and len(str(e)) < 3000, why
        return str(e)
    except Exception as e:
        raise AssertionError(f"{why}: {type(e).__name__}: {e}"[:300]) from e
    return None


def dump(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path, request.param, {"use_sliding_window": True, "sliding_window": 4}, head_dim=16)


EVERY = [pytest.param(1, marks=pytest.mark.slow), 23]  # the core tries one pair of 23, others for each family


@pytest.mark.parametrize("step", EVERY)
def test_keys_of_config_json(directory: Path, step: int) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    heads = {**values, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    alias = {**values, "model_type": "Yi", "architectures": ["YiForCausalLM"], "use_sliding_window": False}
    start = FAMILIES.index(values["model_type"]) % step
    for base in (values, heads, alias):
        for key, value in list(product(KEYS, ODD))[start::step]:
            dump(path, {**base, key: value})
            assert_named(directory, (key, value))


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "dynamic"])
def test_keys_of_rotary_scaling(kind: str, step: int, tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for outer, key, value in list(product(("rope_scaling", "rope_parameters"), ROPE, ODD))[::step]:
        dump(path, {**values, outer: {**ROPE, "rope_type": kind, key: value}})
        assert_named(tmp_path, (outer, key, value))


def test_negative_mscale_divides_by_no_zero(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    scaling = {"rope_type": "yarn", "factor": 22026.465794806718, "mscale": 1.0, "mscale_all_dim": -1.0}
    dump(path, {**json.loads(path.read_text()), "rope_scaling": {**scaling, "original_max_position_embeddings": 64}})
    assert_named(tmp_path, scaling)


@pytest.mark.slow
def test_keys_of_quantization(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    convert(write_checkpoint(tmp_path / "meta"), source, "hf", quantization="int8")
    path = source / "config.json"
    values = json.loads(path.read_text())
    config = values["quantization_config"]

    def spoil(inner: Any, value: Any) -> Iterator[Any]:
        """`inner` with one of its values, at any depth, replaced."""
        if isinstance(inner, dict):
            for key in inner:
                for spoilt in (value, *spoil(inner[key], value)):
                    yield {**inner, key: spoilt}

    for value in ODD[::2]:
        for spoilt in spoil(config, value):
            dump(path, {**values, "quantization_config": spoilt})
            assert_named(source, value)


@pytest.mark.parametrize("step", EVERY)
def test_keys_of_params_json(tmp_path: Path, step: int) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "params.json"
    values = json.loads(path.read_text())
    more = ("rope_scaling", "use_scaled_rope", "rope_scaling_factor", "head_dim", "sliding_window", "sliding_layers")
    more += ("qkv_bias", "qk_norm", "tied_embeddings", "max_seq_len")
    for key, value in list(product((*values, *more), ODD))[::step]:
        dump(path, {**values, key: value})
        assert_named(tmp_path, (key, value))
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, "truncate": True}
    for key, value in list(product(scaling, ODD))[::step]:
        dump(path, {**values, "rope_scaling": {**scaling, key: value}})
        assert_named(tmp_path, (key, value))


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_inspect_lists_and_raises_nothing(name: str, step: int, tmp_path: Path) -> None:
    write_hf_checkpoint(tmp_path)
    keys = ("eos_token_id", "bos_token", "eos_token", "chat_template", "added_tokens_decoder", "do_sample", "top_p")
    for key, value in list(product(keys, ODD))[::step]:
        dump(tmp_path / "hf" / name, {key: value})
        assert_named(tmp_path / "hf", (name, key, value), lambda directory: inspect(directory).as_json())


def test_layer_types_of_lists(tmp_path: Path) -> None:
    write_model(tmp_path, "mistral", {"layer_types": [["full_attention"], ["sliding_attention"]]})
    assert "layer_types is [['full_attention'], ['sliding" in str(assert_named(tmp_path, "lists"))
