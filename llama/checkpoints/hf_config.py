"""Hugging Face's `config.json` <-> ModelArgs, by the records of `families`. The network knows no family.

Knows no tensors and no other files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._util.files import read_json
from ..accelerate.quantization import Quantization
from ..errors import LlamaError
from ..model import ModelArgs, feed_forward_size
from ..rotary import LARGEST, RopeScaling
from .compressed_tensors import quantization_of
from .families import FAMILIES, Family
from .hf_head import architecture, drop_head_keys, head_keys, read_head, task_of
from .task_spec import SPECS, HeadConfig, TaskName

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
ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", ORIGINAL, "partial_rotary_factor"}
ROPE_KEYS |= {"mscale", "mscale_all_dim", "finetuned", *(key for keys in ROPE_TYPES.values() for key in keys)}


class Config:
    """A JSON configuration whose values are checked as they are read; each check raises LlamaError."""

    path: Path  # the file it came from, for messages
    values: Mapping[str, Any]  # by key
    defaults: Mapping[str, Any]  # values of keys that it lacks
    spelling: Mapping[str, str]  # what the file calls a key, where that differs

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        spelling: Mapping[str, str] | None = None,
    ):
        self.path, self.values, self.defaults, self.spelling = path, values, defaults, spelling or {}

    def error(self, key: str, value: Any, expected: str) -> LlamaError:
        return LlamaError(f"{self.path}: {self.spelling.get(key, key)} is {value!r}, expected {expected}")

    def value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def count(self, key: str) -> int:
        if key not in self.values and key not in self.defaults:
            name = self.spelling.get(key, key)
            raise LlamaError(f"{self.path}: missing key {name}; expected a whole number of at least 1")
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LARGEST:
            raise self.error(key, value, "a whole number of at least 1")
        return value

    def optional_count(self, key: str) -> int | None:
        return None if self.value(key) is None else self.count(key)

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
            raise self.error(key, value, "a positive number")
        return value

    def flag(self, key: str) -> bool:
        value = self.value(key, False)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value


@dataclass(frozen=True)
class ModelConfig:
    """What a `config.json` means."""

    family: Family
    args: ModelArgs  # of a model with a head, which has no output layer, tied_embeddings is True
    quantization: Quantization | None  # how the matrices are quantized in the files; None: not at all
    task: TaskName
    head: HeadConfig | None  # None for the task "language"


def read_config(path: Path) -> ModelConfig:
    """Read a model's configuration.

    Raises LlamaError, naming the key, for a model of no family in FAMILIES and for values that can't be.
    """
    values = read_json(path, "a model's configuration")
    family, args, task = family_of(values, path), args_of(values, path), task_of(values)
    values = family.to_llama_keys(values)
    quantization = quantization_of(values.get("quantization_config"), args.tied_embeddings, path)
    if not SPECS[task].tensors:
        return ModelConfig(family, args, quantization, task, None)
    args = replace(args, tied_embeddings=True)
    return ModelConfig(family, args, quantization, task, read_head(values, task, path))


def family_of(values: Mapping[str, Any], path: Path) -> Family:
    """The family that `model_type` names. `path` is where the configuration came from, for messages."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise LlamaError(f"{path}: model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def args_of(values: Mapping[str, Any], path: Path) -> ModelArgs:
    """The ModelArgs of a configuration. `path` is where it came from, for messages."""
    family = family_of(values, path)
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
    """(sliding_window, sliding_layers) of ModelArgs."""
    if family.window is None:
        return None, None
    if family.window == "all layers":
        return config.optional_count("sliding_window"), None
    if not config.flag("use_sliding_window") or config.value("sliding_window") is None:
        return None, None
    types = config.value("layer_types")
    if types is None:
        first = config.value("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise config.error("max_window_layers", first, "the number of layers without a window")
        layers = tuple(range(first, n_layers))
    elif isinstance(types, list) and len(types) == n_layers and set(types) <= {"full_attention", "sliding_attention"}:
        layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    else:
        raise config.error("layer_types", types, f"full_attention or sliding_attention for each of {n_layers} layers")
    window = config.count("sliding_window") if layers else None
    return window, layers if 0 < len(layers) < n_layers else None


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
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if "attention_factor" not in fields and mscale and mscale_all_dim:
            log = 0.1 * math.log(max(fields["factor"], 1))
            fields["attention_factor"] = (mscale * log + 1) / (mscale_all_dim * log + 1)
    return fields


def config_of(
    args: ModelArgs,
    base: Mapping[str, Any],
    dtype: torch.dtype,
    task: TaskName = "language",
    head: HeadConfig | None = None,
) -> dict[str, Any]:
    """The `config.json` of a model of these sizes.

    base: the configuration of the same model in another format, whose other keys are kept; {} where there is none.
    The family is that of `base`, or else the first from whose keys `args` are read back. Raises LlamaError where no
    family holds all of `args`.
    """
    source = FAMILIES.get(base.get("model_type", ""))
    values = dict(base) if source is None else source.to_llama_keys(base)
    families = [family for family in FAMILIES.values() if family is not source]
    for family in families if source is None else [source, *families]:
        config = {**values, **model_keys(args, family), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.setdefault("max_position_embeddings", trained_length(args))
        for newer in ("rope_parameters", "dtype"):  # older readers don't know these: the older keys say the same
            config.pop(newer, None)
        if head is not None:
            config = {**drop_head_keys(config), **head_keys(head, task, family)}
        family_config = family.to_own_keys(config)
        if is_same_model(args_of(family_config, Path("config.json")), args):
            if head is not None:  # `args` count as tied, since there is no output layer
                family_config[family.key("tie_word_embeddings")] = values.get("tie_word_embeddings", False)
            return family_config
    raise LlamaError(
        f"no family of Hugging Face's ({', '.join(FAMILIES)}) has what this model has: qkv_bias={args.qkv_bias}, "
        f"wo_bias={args.wo_bias}, mlp_bias={args.mlp_bias}, qk_norm={args.qk_norm}, "
        f"sliding_window={args.sliding_window}: keep it in Meta's layout"
    )


def model_keys(args: ModelArgs, family: Family) -> dict[str, Any]:
    """What a family's `config.json` says of these sizes, in Llama's keys."""
    keys: dict[str, Any] = {
        "architectures": [architecture(family, "language")],
        "model_type": family.model_type,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope_keys(args.rope_scaling),
        "tie_word_embeddings": args.tied_embeddings,
    }
    if args.head_dim is not None or "head_dim" in family.defaults:
        keys["head_dim"] = args.head_size
    flags = {name: getattr(family, name) for name in BIASES_AND_NORMS}
    keys |= {key: getattr(args, name) for name, key in flags.items() if isinstance(key, str)}
    return keys | window_keys(args, family)


def window_keys(args: ModelArgs, family: Family) -> dict[str, Any]:
    """What a family's `config.json` says of the sliding window; see `Family.window`."""
    if family.window is None:
        return {}
    if family.window == "all layers":
        return {"sliding_window": args.sliding_window}
    if args.sliding_window is None:
        return {"use_sliding_window": False}
    sliding = range(args.n_layers) if args.sliding_layers is None else args.sliding_layers
    return {
        "use_sliding_window": True,
        "sliding_window": args.sliding_window,
        "layer_types": ["sliding_attention" if i in sliding else "full_attention" for i in range(args.n_layers)],
        "max_window_layers": min(sliding),
    }


def rope_keys(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type in ("llama3", "yarn"):
        keys[ORIGINAL] = scaling.original_max_position_embeddings
    for name in ROPE_TYPES[scaling.type]:
        value = getattr(scaling, name)
        if scaling.type == "llama3" or value != getattr(RopeScaling, name):  # yarn's may be left out
            keys[name] = value
    return keys


def trained_length(args: ModelArgs) -> int:
    """`max_position_embeddings` of the published models with such sizes, for a model whose files don't have it."""
    if args.rope_scaling is None:
        return 8192 if args.rope_theta == 500000 else 4096
    original, kind = args.rope_scaling.original_max_position_embeddings, args.rope_scaling.type
    if kind == "llama3":
        return 131072
    return original if kind == "dynamic" else int(original * args.rope_scaling.factor)


def is_same_model(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether both describe the same network, even by different fields."""

    def normalize(args: ModelArgs) -> ModelArgs:
        sizes = {"n_kv_heads": args.kv_heads, "head_dim": args.head_size, "multiple_of": args.hidden_dim}
        return replace(args, **sizes, ffn_dim_multiplier=None, max_batch_size=1, max_seq_len=1)  # type: ignore[arg-type]

    return normalize(a) == normalize(b)
