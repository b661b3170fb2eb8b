"""The family of a `config.json` whose `model_type` is missing, or is none of FAMILIES: many models are Llama by it.

`architectures` may name the class of a known family. Otherwise the tensors decide: a model whose tensors have Llama's
names, and whose configuration has no key that Llama's lacks, is read as the network that these make. Families that only
look like that are listed here. Knows names; opens no file.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LlamaError, shorten
from .families import FAMILIES, LLAMA, Family
from .hf_head import BACKBONE, class_name
from .task_spec import SPECS

# Tensors of Llama's names, computed with in another way: other norms, factors, rotary pairs or windows.
LOOKALIKES = {
    *("cwm", "ernie4_5", "exaone", "gemma", "gemma2", "gemma3_text", "granite", "helium", "minicpm", "minicpm3"),
    *("ministral3", "mixtral", "olmo", "olmo2", "phimoe", "smollm3"),
}
# The keys that a configuration of an unknown family may have: those that Llama's classes read, and those that say
# nothing of the computation.
KNOWN_KEYS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "bias", "quantization_config", "model_max_length", "is_llama_config"),
    *("attention_dropout", "hidden_dropout", "residual_dropout", "classifier_dropout", "initializer_range"),
    *("architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "transformers_version"),
    *("torch_dtype", "dtype", "torchscript", "tokenizer_class", "pretraining_tp", "use_cache", "is_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
}
NEEDED = ("rms_norm_eps", "rope_theta")  # keys whose defaults differ from family to family
NORMS = {"attention_norm": "ln1", "ffn_norm": "ln2"}  # in files of Yi's first release


@dataclass(frozen=True)
class FoundFamily:
    """The family of a configuration."""

    family: Family
    values: dict[str, Any]  # the configuration, in the family's keys
    note: str | None = None  # for people: what was taken, where `model_type` doesn't name a family


def find_family(values: Mapping[str, Any], names: Collection[str], path: Path) -> FoundFamily:
    """The family of a configuration. names: of the tensors in the files; path: of the configuration, for messages.

    Raises LlamaError for a family that isn't known and isn't Llama under another name.
    """
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FoundFamily(FAMILIES[model_type], dict(values))
    unknown = f"{path}: model_type is {shorten(model_type)}, expected one of {', '.join(FAMILIES)}"
    if not (model_type is None or isinstance(model_type, str)) or model_type in LOOKALIKES:
        raise LlamaError(unknown)
    said = "has no model_type" if model_type is None else f"has the model_type {shorten(model_type)}"
    if (family := find_by_class(values)) is not None:
        note = f"{path} {said}: read as {family.label}, as its architectures say"
        return FoundFamily(family, {**values, "model_type": family.model_type}, note)
    if model_type is None and not class_name(values):
        raise LlamaError(unknown)
    if others := [key for key in values if key not in KNOWN_KEYS and values[key] not in (None, False, [], {})]:
        raise LlamaError(f"{unknown}; it isn't Llama under another name, since it has {shorten(others[0])}")
    rope = [values[key] for key in ("rope_scaling", "rope_parameters") if isinstance(values.get(key), dict)]
    if absent := [key for key in NEEDED if not any(key in keys for keys in (values, *rope))]:
        raise LlamaError(f"{unknown}; to be read as Llama it needs {absent[0]}, whose default is not known")
    family = read_off_tensors(names)
    biases = {"attention_bias": has_tensor(names, "o_proj.bias"), "mlp_bias": has_tensor(names, "gate_proj.bias")}
    note = f"{path} {said}: read as {family.label}, whose tensors it has"
    return FoundFamily(family, {**values, **biases, "model_type": family.model_type}, note)


def find_by_class(values: Mapping[str, Any]) -> Family | None:
    """The family that has the class in `architectures`."""
    suffixes = [BACKBONE, *(spec.suffix for spec in SPECS.values())]
    classes = {family.class_stem + suffix: family for family in FAMILIES.values() for suffix in suffixes}
    return classes.get(class_name(values))


def read_off_tensors(names: Collection[str]) -> Family:
    """The first family whose network has such tensors; without its defaults, which are those of published models."""
    has_norms = has_tensor(names, "self_attn.q_norm.weight")
    has_qkv_bias = has_tensor(names, "q_proj.bias") and not has_tensor(names, "o_proj.bias")
    alike = (f for f in FAMILIES.values() if (f.qk_norm is True, f.qkv_bias is True) == (has_norms, has_qkv_bias))
    family = next(alike, LLAMA)  # whatever else its tensors are is compared with it later
    norms = {name: norm for name, norm in NORMS.items() if has_tensor(names, f".{norm}.weight")}
    return replace(family, defaults=LLAMA.defaults, tensor_names=norms, window=None)


def has_tensor(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)
