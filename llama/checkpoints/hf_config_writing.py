"""ModelArgs -> Hugging Face's `config.json`, by the records of `families`.

Knows no tensors and no other files.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import LlamaError
from ..model import ModelArgs
from ..rotary import RopeScaling
from .families import FAMILIES, Family
from .hf_config import BIASES_AND_NORMS, FULL, ORIGINAL, ROPE_TYPES, SLIDING, args_of
from .hf_head import architecture, drop_head_keys, head_keys
from .task_spec import HeadConfig, TaskName


def config_of(
    args: ModelArgs,
    base: Mapping[str, Any],
    dtype: torch.dtype,
    task: TaskName = "language",
    head: HeadConfig | None = None,
    has_output: bool = True,
) -> dict[str, Any]:
    """The `config.json` of a model of these sizes.

    base: the configuration of the same model in another format, whose other keys are kept; {} where there is none.
    has_output: whether it has an output layer, or a head; without either, `args` count as tied.
    The family is that of `base`, or else the first from whose keys `args` are read back. Raises LlamaError where no
    family holds all of `args`.
    """
    source = FAMILIES.get(base.get("model_type", ""))
    # The code that `auto_map` names is that of a class with another name.
    values = drop_key(base, "auto_map") if source is None else source.to_llama_keys(base)
    families = [family for family in FAMILIES.values() if family is not source]
    for family in families if source is None else [source, *families]:
        config = {**values, **model_keys(args, family), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.setdefault("max_position_embeddings", trained_length(args))
        for newer in ("rope_parameters", "dtype"):  # older readers don't know these: the older keys say the same
            config.pop(newer, None)
        if head is not None:
            config = {**drop_head_keys(config), **head_keys(head, task, family)}
        family_config = family.to_own_keys(config)
        if is_same_model(args_of(family_config, family, Path("config.json")), args):
            if not has_output:
                family_config["architectures"] = [architecture(family, task, has_output)]
            if head is not None or not has_output:  # `args` count as tied, since there is no output layer
                family_config[family.key("tie_word_embeddings")] = values.get("tie_word_embeddings", False)
            return family_config
    raise LlamaError(
        f"no family of Hugging Face's ({', '.join(FAMILIES)}) has what this model has: qkv_bias={args.qkv_bias}, "
        f"wo_bias={args.wo_bias}, mlp_bias={args.mlp_bias}, qk_norm={args.qk_norm}, "
        f"sliding_window={args.sliding_window}: keep it in Meta's layout"
    )


def drop_key(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


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
    # transformers reads a mistral with `layer_types` as a ministral, which always needs this key.
    is_ministral = family.window == "all layers" and args.sliding_layers is not None
    if args.head_dim is not None or is_ministral or "head_dim" in family.defaults:
        keys["head_dim"] = args.head_size
    flags = {name: getattr(family, name) for name in BIASES_AND_NORMS}
    keys |= {key: getattr(args, name) for name, key in flags.items() if isinstance(key, str)}
    return keys | window_keys(args, family)


def window_keys(args: ModelArgs, family: Family) -> dict[str, Any]:
    """What a family's `config.json` says of the sliding window; see `Family.window`."""
    if family.window is None:
        return {}
    sliding = range(args.n_layers) if args.sliding_layers is None else args.sliding_layers
    types = [SLIDING if args.sliding_window and i in sliding else FULL for i in range(args.n_layers)]
    keys: dict[str, Any] = {"sliding_window": args.sliding_window}
    if family.window == "all layers":
        return keys if args.sliding_layers is None else {**keys, "layer_types": types}
    if args.sliding_window is None:
        return {"use_sliding_window": False}
    return {**keys, "use_sliding_window": True, "layer_types": types, "max_window_layers": min(sliding)}


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
