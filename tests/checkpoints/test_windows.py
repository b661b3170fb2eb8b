"""Sliding windows: whatever form a `config.json` has them in, logits are those of transformers, and stay so."""

from pathlib import Path
from typing import Any

import pytest
from against_transformers import (
    assert_same_logits,
    edit_config,
    logits_of_transformers,
    write_model,
    write_tokenizer_json,
)

from llama import LlamaError
from llama.checkpoints.convert import convert
from llama.checkpoints.loader import open_checkpoint
from llama.parallel import Place

FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, FULL]
QWEN = {"use_sliding_window": True, "sliding_window": 4}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # family, edits
    "mistral with layer types": ("mistral", {"sliding_window": 4, "layer_types": MIXED}),
    "mistral, types the other way": ("mistral", {"sliding_window": 4, "layer_types": MIXED[::-1]}),
    "mistral, all layers slide": ("mistral", {"sliding_window": 4, "layer_types": [SLIDING] * 2}),
    "mistral, no layer slides": ("mistral", {"sliding_window": 4, "layer_types": [FULL] * 2}),
    "mistral, types null": ("mistral", {"sliding_window": 4, "layer_types": None}),
    "mistral, older name of a type": ("mistral", {"sliding_window": 4, "layer_types": ["attention", SLIDING]}),
    "ministral": ("ministral", {"sliding_window": 4, "layer_types": MIXED}),
    "ministral without types": ("ministral", {"sliding_window": 4, "layer_types": "drop"}),
    "qwen2 types": ("qwen2", {**QWEN, "layer_types": MIXED}),
    "qwen2 types against max_window_layers": ("qwen2", {**QWEN, "layer_types": MIXED, "max_window_layers": 1}),
    "qwen2 by max_window_layers": ("qwen2", {**QWEN, "layer_types": "drop", "max_window_layers": 1}),
    "qwen2 types null": ("qwen2", {**QWEN, "layer_types": None, "max_window_layers": 0}),
    "qwen2, the window is off": (
        "qwen2",
        {**QWEN, "use_sliding_window": False, "layer_types": "drop", "max_window_layers": 0},
    ),
    "qwen2, no layer slides": ("qwen2", {**QWEN, "layer_types": [FULL] * 2, "max_window_layers": 0}),
    "qwen3 types": ("qwen3", {**QWEN, "layer_types": MIXED}),
    "qwen3 types, window off": ("qwen3", {"use_sliding_window": False, "layer_types": [FULL] * 2}),
    "llama knows no window": ("llama", {"sliding_window": 4, "layer_types": [FULL] * 2}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path, place: Place) -> None:
    family, edits = FORMS[form]
    size = {"head_dim": 16} if family in ("qwen3", "ministral") else {}
    assert_same_logits(edit_config(write_model(tmp_path, family, **size), **edits), place)


@pytest.mark.parametrize("form", ["mistral with layer types", "ministral", "mistral, all layers slide", "qwen3 types"])
def test_they_survive_other_formats(form: str, tmp_path: Path, place: Place) -> None:
    family, edits = FORMS[form]
    source = edit_config(write_model(tmp_path / "source", family, head_dim=16), **edits)
    write_tokenizer_json(source)
    expected = logits_of_transformers(source)
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    (tmp_path / "meta" / "config.json").unlink()  # so that the family is chosen by the sizes
    convert(tmp_path / "meta", tmp_path / "anew", "hf")
    for directory in ("meta", "hf", "anew"):
        assert_same_logits(tmp_path / directory, place, expected)
    for directory in ("hf", "anew"):
        assert_same_logits(tmp_path / directory, place)


@pytest.mark.parametrize(
    ("family", "edits", "message"),
    [
        ("mistral", {"layer_types": [["sliding_attention"], ["full_attention"]]}, "layer_types is [['sliding"),
        ("qwen2", {**QWEN, "layer_types": [{}, []]}, "layer_types is [{}, []], expected full_attention or sliding"),
        ("qwen3", {**QWEN, "layer_types": "sliding_attention"}, "layer_types is 'sliding_attention', expected"),
        ("mistral", {"layer_types": {"0": "full_attention", "1": "full_attention"}}, "layer_types is {'0'"),
        ("mistral", {"layer_types": MIXED, "sliding_window": None}, "full_attention for all layers, since"),
        ("mistral", {"layer_types": ["chunked_attention", FULL]}, "layer_types is ['chunked_attention'"),
        ("ministral", {"layer_types": MIXED[:1]}, "for each of 2 layers"),
        ("ministral", {"sliding_window": 0}, "sliding_window is 0, expected a whole number"),
        ("qwen2", {"use_sliding_window": False, "layer_types": MIXED}, "use_sliding_window"),
        ("qwen2", {**QWEN, "sliding_window": None, "layer_types": MIXED}, "full_attention for all layers, since"),
        ("qwen3", {**QWEN, "layer_types": "drop", "max_window_layers": []}, "max_window_layers is [], expected"),
    ],
)
def test_what_transformers_would_not_run_is_named(
    family: str, edits: dict[str, Any], message: str, tmp_path: Path
) -> None:
    edit_config(write_model(tmp_path, family, head_dim=16), **edits)
    with pytest.raises(LlamaError) as error:
        open_checkpoint(tmp_path)
    assert message in str(error.value) and "config.json" in str(error.value)
