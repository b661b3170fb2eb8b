"""Hugging Face's `config.json` <-> ModelArgs: what tells one family from another. Past here there are no families.

Knows no tensors and no other files.
"""

import math
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
from .task_spec import HeadConfig, Task, architecture, config_keys, read_head, task_of, without_head

# What each family's configuration means where it says nothing.
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {**QWEN},
    "qwen3": {**QWEN, "head_dim": 128},
}

ROPE_TYPES = {  # the keys of each type of rotary scaling that have a meaning here
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
    """A `config.json`, read field by field; each is checked as it is asked for."""

    def __init__(self, path: Path, values: dict[str, Any], defaults: dict[str, Any]):
        self.path, self.values, self.defaults = path, values, defaults

    def error(self, key: str, value: Any, expected: str) -> LlamaError:
        return LlamaError(f"{self.path}: {key} is {value!r}, expected {expected}")

    def value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def count(self, key: str) -> int:
        if key not in self.values and key not in self.defaults:
            raise LlamaError(f"{self.path}: missing key {key}; expected a whole number of at least 1")
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
class Described:
    """What a `config.json` means. quantization: how matrices are rounded; None: they aren't. head: of tasks that have
    one, which have no output layer: theirs counts as tied."""

    family: str
    args: ModelArgs
    quantization: Quantization | None
    task: Task
    head: HeadConfig | None


def read_config(path: Path) -> Described:
    """Raises LlamaError for no model of these families and for what can't be read, naming the key."""
    values = read_json(path, "a model's configuration")
    args, task = args_of(values, path), task_of(values)
    quantization = quantization_of(values.get("quantization_config"), args.tied_embeddings, path)
    if task == "language":
        return Described(values["model_type"], args, quantization, task, None)
    return Described(
        values["model_type"], replace(args, tied_embeddings=True), quantization, task, read_head(values, task, path)
    )


def args_of(values: dict[str, Any], path: Path) -> ModelArgs:
    """The ModelArgs that a configuration means; `path` is where it came from, for messages."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise LlamaError(f"{path}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    config = Config(path, values, FAMILIES[family])
    if config.value("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", config.value("hidden_act"), "'silu'")
    dim, n_heads, n_layers = (config.count(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    n_kv_heads = config.optional_count("num_key_value_heads") or n_heads
    multiple_of, multiplier = feed_forward_fields(dim, config.count("intermediate_size"))
    theta, scaling = rope_of(config)
    window, sliding_layers = window_of(config, family, n_layers)
    attention_bias = family in ("llama", "qwen3") and config.flag("attention_bias")
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
        qkv_bias=attention_bias or family == "qwen2",
        wo_bias=attention_bias,
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tied_embeddings=config.flag("tie_word_embeddings"),
        sliding_window=window,
        sliding_layers=sliding_layers,
    )


def feed_forward_fields(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """Meta's two fields, (multiple_of, ffn_dim_multiplier), from which `feed_forward_size` makes this hidden size."""
    for multiple_of in (256, 1024):  # as the published models have them
        for multiplier in (None, 1.3, 1.5, 1.2, 1.4):
            if feed_forward_size(4 * dim, multiple_of, multiplier) == hidden_dim:
                return multiple_of, multiplier
    multiple_of = math.gcd(hidden_dim, 256)
    # Half a unit below, rounding up gives the size itself, whatever the product's last digit does.
    return multiple_of, (hidden_dim - multiple_of / 2 + (multiple_of == 1)) / int(8 * dim / 3)


def window_of(config: Config, family: str, n_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """(sliding window, the layers that have it; None: all)."""
    if family == "llama":
        return None, None
    if family == "mistral":
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
    """(theta, scaling), from `rope_scaling` or the newer `rope_parameters`."""
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
    if config.values.get(ORIGINAL):  # which wins over the one within, as in transformers
        merged[ORIGINAL] = config.values[ORIGINAL]
    inner = Config(config.path, merged, config.defaults)
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
    """The fields of RopeScaling that the keys of one type of scaling mean."""
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
    base: dict[str, Any],
    dtype: torch.dtype,
    task: Task = "language",
    head: HeadConfig | None = None,
) -> dict[str, Any]:
    """The `config.json` that means `args`: `base`, of the same model in another layout, with the keys that matter set.

    Its family is that of `base`, or the first whose reading gives `args` back. Raises LlamaError where none does.
    """
    families = [f for f in FAMILIES if f != base.get("model_type")]
    for family in [base["model_type"], *families] if base.get("model_type") in FAMILIES else families:
        config = {**base, **family_keys(args, family), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.setdefault("max_position_embeddings", trained_length(args))
        for newer in ("rope_parameters", "dtype"):  # what older readers don't know is said in their words alone
            config.pop(newer, None)
        if head is not None:
            config = {**without_head(config), **config_keys(head, task, family)}
        if same_model(args_of(config, Path("config.json")), args):
            if head is not None:  # which counts as tied here, and has nothing that could be
                config["tie_word_embeddings"] = base.get("tie_word_embeddings", False)
            return config
    raise LlamaError(
        f"no family of Hugging Face's ({', '.join(FAMILIES)}) has what this model has: qkv_bias={args.qkv_bias}, "
        f"wo_bias={args.wo_bias}, mlp_bias={args.mlp_bias}, qk_norm={args.qk_norm}, "
        f"sliding_window={args.sliding_window}: keep it in Meta's layout"
    )


def family_keys(args: ModelArgs, family: str) -> dict[str, Any]:
    """The keys of a family's `config.json` for these sizes."""
    keys: dict[str, Any] = {
        "architectures": [architecture(family, "language")],
        "model_type": family,
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
    if args.head_dim is not None or "head_dim" in FAMILIES[family]:
        keys["head_dim"] = args.head_size
    if family in ("llama", "qwen3"):
        keys["attention_bias"] = args.wo_bias
    if family == "llama":
        keys["mlp_bias"] = args.mlp_bias
    if family == "mistral":
        keys["sliding_window"] = args.sliding_window
    if family.startswith("qwen"):
        keys["use_sliding_window"] = args.sliding_window is not None
        if args.sliding_window is not None:
            sliding = range(args.n_layers) if args.sliding_layers is None else args.sliding_layers
            kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(args.n_layers)]
            keys |= {"sliding_window": args.sliding_window, "layer_types": kinds, "max_window_layers": min(sliding)}
    return keys


def rope_keys(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type in ("llama3", "yarn"):
        keys[ORIGINAL] = scaling.original_max_position_embeddings
    for name in ROPE_TYPES[scaling.type]:
        value = getattr(scaling, name)
        if scaling.type == "llama3" or value != getattr(RopeScaling, name):  # which yarn may leave out
            keys[name] = value
    return keys


def trained_length(args: ModelArgs) -> int:
    """How long the model's texts may be, where only its sizes are known: as the published models have it."""
    if args.rope_scaling is None:
        return 8192 if args.rope_theta == 500000 else 4096
    original, kind = args.rope_scaling.original_max_position_embeddings, args.rope_scaling.type
    if kind == "llama3":
        return 131072
    return original if kind == "dynamic" else int(original * args.rope_scaling.factor)


def same_model(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether both mean the same network, however they say it."""

    def spelled_out(args: ModelArgs) -> ModelArgs:
        sizes = {"n_kv_heads": args.kv_heads, "head_dim": args.head_size, "multiple_of": args.hidden_dim}
        return replace(args, **sizes, ffn_dim_multiplier=None, max_batch_size=1, max_seq_len=1)  # type: ignore[arg-type]

    return spelled_out(a) == spelled_out(b)
