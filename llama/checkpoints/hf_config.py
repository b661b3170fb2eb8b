"""Hugging Face's `config.json` <-> ModelArgs, by the records of `families`. The network knows no family.

Knows no tensors and no other files.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._util.files import read_json
from .._util.validate import is_integer
from ..accelerate.quantization import Quantization
from ..errors import LlamaError
from ..model import ModelArgs, feed_forward_size
from ..rotary import RopeScaling
from .compressed_tensors import quantization_of
from .config_values import Config
from .families import Family
from .hf_head import has_backbone_class, read_head, task_of
from .task_spec import SPECS, HeadConfig, TaskName
from .unnamed_families import find_family

BIASES_AND_NORMS = ("qkv_bias", "wo_bias", "mlp_bias", "qk_norm")  # fields of both ModelArgs and Family
# Type of rotary scaling -> the keys that it reads, beside those that all types have, and the keys that it needs.
ROPE_TYPES = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
}
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}  # in `layer_types`; the last is an older name
ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", ORIGINAL, "partial_rotary_factor"}
ROPE_KEYS |= {"mscale", "mscale_all_dim", "finetuned", *(key for keys in ROPE_TYPES.values() for key in keys)}


@dataclass(frozen=True)
class ModelConfig:
    """What a `config.json` means."""

    family: Family
    args: ModelArgs  # of a model with a head, which has no output layer, tied_embeddings is True
    quantization: Quantization | None  # how the matrices are quantized in the files; None: not at all
    task: TaskName
    head: HeadConfig | None  # None for the task "language"
    is_backbone: bool  # whether `architectures` names the network without an output layer: LlamaModel
    note: str | None  # as in FoundFamily
    trained_length: int | None  # positions that the model was made for; None: the file doesn't say


def read_config(path: Path, names: Collection[str] = ()) -> ModelConfig:
    """Read a model's configuration. names: of the tensors in its files, which may tell the family.

    Raises LlamaError, naming the key, for a model of no known family and for values that can't be.
    """
    found = find_family(read_json(path, "a model's configuration"), names, path)
    family, args, task = found.family, args_of(found.values, found.family, path), task_of(found.values)
    values = family.to_llama_keys(found.values)
    quantization = quantization_of(values.get("quantization_config"), args.tied_embeddings, path)
    length = trained_length_of(values, args.rope_scaling)
    config = ModelConfig(family, args, quantization, task, None, has_backbone_class(values), found.note, length)
    if not SPECS[task].tensors:
        return config
    return replace(config, args=replace(args, tied_embeddings=True), head=read_head(values, task, path))


def args_of(values: Mapping[str, Any], family: Family, path: Path) -> ModelArgs:
    """The ModelArgs of a family's configuration. `path` is where it came from, for messages."""
    config = Config(path, family.to_llama_keys(values), family.defaults, family.keys)
    if config.value("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", config.value("hidden_act"), "'silu'")
    dim, n_heads, n_layers = (config.count(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    n_kv_heads = config.optional_count("num_key_value_heads") or n_heads
    multiple_of, multiplier = feed_forward_fields(dim, config.count("intermediate_size"))
    theta, scaling = rope_of(config)
    window, sliding_layers = window_of(config, family, n_layers)
    flags = {name: is_set(config, getattr(family, name)) for name in BIASES_AND_NORMS}
    head_dim = config.optional_count("head_dim")
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=config.count("vocab_size"),
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=None if head_dim == dim / n_heads else head_dim,
        tied_embeddings=config.flag("tie_word_embeddings"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        **flags,
    )


def trained_length_of(values: Mapping[str, Any], scaling: RopeScaling | None) -> int | None:
    """`max_position_embeddings` of Llama's keys, or more where rotary embeddings are stretched."""
    length = values.get("max_position_embeddings")
    if not isinstance(length, int) or not is_integer(length, 1):
        return None
    if scaling is None:
        return length
    # Files state the length before or after the stretching: the larger of both is no reason for a note.
    before = scaling.original_max_position_embeddings if scaling.type in ("llama3", "yarn") else length
    return int(max(length, scaling.factor * (before or length)))


def is_set(config: Config, flag: bool | str) -> bool:
    """Whether the model has a feature. flag: the Family's field, which is the answer, or a key of config.json."""
    return flag if isinstance(flag, bool) else config.flag(flag)


def feed_forward_fields(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """Meta's two fields, (multiple_of, ffn_dim_multiplier), from which `feed_forward_size` makes this hidden size."""
    for multiple_of in (256, 1024):  # as the published models have them
        for multiplier in (None, 1.3, 1.5, 1.2, 1.4):
            if feed_forward_size(4 * dim, multiple_of, multiplier) == hidden_dim:
                return multiple_of, multiplier
    multiple_of = math.gcd(hidden_dim, 256)
    # The product is to be half a unit below the size: it is then rounded up to the size itself, in spite of errors in
    # its last digit.
    return multiple_of, (hidden_dim - multiple_of / 2 + (multiple_of == 1)) / int(8 * dim / 3)


def window_of(config: Config, family: Family, n_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """(sliding_window, sliding_layers) of ModelArgs; see `Family.window`."""
    if family.window is None:
        return None, None
    in_all = family.window == "all layers"
    window = config.optional_count("sliding_window") if in_all or config.flag("use_sliding_window") else None
    types = layer_types_of(config, n_layers)
    if types is not None:
        layers = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
        if layers and window is None:
            why = "since there is no sliding_window" + " with use_sliding_window" * (not in_all)
            raise config.error("layer_types", types, f"{FULL} for all layers, {why}")
    elif window is None or in_all:
        return window, None
    else:
        first = config.value("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise config.error("max_window_layers", first, "the number of layers without a window")
        layers = tuple(range(first, n_layers))
    return window if layers else None, layers if 0 < len(layers) < n_layers else None


def layer_types_of(config: Config, n_layers: int) -> list[str] | None:
    """What each layer sees, FULL or SLIDING; None where the configuration doesn't say."""
    types = config.value("layer_types")
    if types is None:
        return None
    kinds = [LAYER_TYPES.get(kind) if isinstance(kind, str) else None for kind in as_list(types)]
    if len(kinds) != n_layers or None in kinds:
        raise config.error("layer_types", types, f"{FULL} or {SLIDING} for each of {n_layers} layers")
    return [kind for kind in kinds if kind is not None]


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def rope_of(config: Config) -> tuple[float, RopeScaling | None]:
    """(rope_theta, rope_scaling) of ModelArgs, from `rope_scaling` or the newer `rope_parameters`."""
    key = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    rope = config.value(key) or {}
    if not isinstance(rope, dict):
        raise config.error(key, rope, "a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_TYPES):
        raise config.error(f"{key} type", kind, f"default, {', '.join(ROPE_TYPES)}")
    if unknown := sorted(rope.keys() - ROPE_KEYS):
        raise LlamaError(f"{config.path}: {key} has {', '.join(unknown)}; known are {', '.join(sorted(ROPE_KEYS))}")
    if missing := [name for name in ROPE_NEEDS.get(kind, ()) if rope.get(name) is None]:
        raise LlamaError(f"{config.path}: {key} of type {kind} has no {', '.join(missing)}")
    merged = {**config.values, **rope}
    if config.values.get(ORIGINAL):  # the outer value overrides the inner one, as in transformers
        merged[ORIGINAL] = config.values[ORIGINAL]
    inner = Config(config.path, merged, config.defaults, config.spelling)
    if inner.value("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise inner.error("partial_rotary_factor", inner.value("partial_rotary_factor"), "1.0: whole heads are rotated")
    theta = inner.number("rope_theta", 10000.0)
    if kind == "default":
        return theta, None
    try:
        return theta, RopeScaling(kind, **scaling_fields(kind, rope, inner))
    except (LlamaError, TypeError) as e:
        raise LlamaError(f"{config.path}: {key}: {e}") from None


def scaling_fields(kind: str, rope: dict[str, Any], config: Config) -> dict[str, Any]:
    """The fields of RopeScaling, from the keys of one type of scaling."""
    trained = config.count("max_position_embeddings")
    fields = {name: rope[name] for name in ("factor", *ROPE_TYPES[kind]) if rope.get(name) is not None}
    original = config.optional_count(ORIGINAL) or trained
    if kind != "linear":
        fields[ORIGINAL] = trained if kind == "dynamic" else original
    if kind == "yarn":
        fields.setdefault("factor", trained / original)
        if "attention_factor" not in fields and rope.get("mscale") and rope.get("mscale_all_dim"):
            mscale, mscale_all_dim = (config.number(name, 1.0) for name in ("mscale", "mscale_all_dim"))
            log = 0.1 * math.log(max(config.number("factor", fields["factor"]), 1))
            fields["attention_factor"] = (mscale * log + 1) / (mscale_all_dim * log + 1)
    return fields
