"""peft's `adapter_config.json`: which layers have a plain LoRA adapter, and of which sizes. All else is refused.

Knows no tensors. Files come from strangers, so no regular expression in them is run.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._util.files import read_json
from .._util.validate import is_integer, is_number
from ..checkpoints.hf_config import Config
from ..errors import LlamaError, shorten

# The keys that are read here, and those that don't change what the tensors mean. Every other key must be null, false or
# empty, since it may belong to a feature that changes what is computed.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"}
READ |= {"rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "task_type"}
IGNORED = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config"}
IGNORED |= {"exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"}
IGNORED |= {"eva_config", "loftq_config", "corda_config", "ensure_weight_tying"}
OUTPUT = "lm_head"
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # they leave the base's weights alone


def read_adapter_config(path: Path) -> Config:
    """The configuration. Raises LlamaError for what isn't plain LoRA, and for values of wrong types."""
    config = Config(path, read_json(path, "an adapter's configuration"), {})
    if config.value("peft_type") != "LORA":
        raise config.error("peft_type", config.value("peft_type"), "'LORA'")
    if config.value("bias", "none") != "none":
        raise config.error("bias", config.value("bias"), "'none': the base's biases stay as they are")
    if config.value("init_lora_weights") not in HARMLESS_STARTS:
        start = config.value("init_lora_weights")
        raise config.error("init_lora_weights", start, "a start that leaves the base's weights alone")
    for key in sorted(config.values.keys() - READ - IGNORED):
        if config.value(key):
            raise config.error(shorten(key), config.value(key), "null or false: only plain LoRA is read")
    for key, kind in (("modules_to_save", list), ("rank_pattern", dict), ("alpha_pattern", dict)):
        if not isinstance(config.value(key) or kind(), kind):
            raise config.error(key, config.value(key), f"a {kind.__name__} or null")
    if not isinstance(config.value("target_modules"), list | str) or not config.value("target_modules"):
        raise config.error("target_modules", config.value("target_modules"), "a list of names of layers, or a pattern")
    return config


def read_dropout(config: Config) -> float:
    value = config.value("lora_dropout", 0.0)
    if not is_number(value) or not 0 <= value < 1:
        raise config.error("lora_dropout", value, "a number in [0, 1)")
    return value


def read_size(config: Config, owner: str) -> tuple[int, float]:
    """(r, alpha) of a layer. owner: its Hugging Face name.

    `use_rslora` scales B A by alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732); alpha includes the difference.
    """
    r = match_pattern(config, "rank_pattern", owner, config.count("r"))
    alpha = match_pattern(config, "alpha_pattern", owner, config.value("lora_alpha"))
    if not is_integer(r, 1) or not is_number(r):
        raise config.error("r", r, "a whole number of at least 1")
    if not is_number(alpha) or alpha <= 0 or not is_number(alpha * r**0.5):
        raise config.error("lora_alpha", alpha, "a number above 0")
    return r, alpha * r**0.5 if config.flag("use_rslora") else alpha


def match_pattern(config: Config, key: str, owner: str, default: Any) -> Any:
    """The value of the first pattern that is the layer's name or the end of it; the default if there is none."""
    for pattern, value in (config.value(key) or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise LlamaError(f"{config.path}: {key} has {shorten(pattern)}, expected names of layers and no patterns")
        if owner == pattern.removeprefix("^") or ends_with(owner, pattern):
            return value
    return default


def select_targets(config: Config, modules: Iterable[str]) -> list[str]:
    """The linear layers that must have an adapter; none if regular expressions choose them, since those aren't run.

    modules: all linear layers, by Hugging Face's names.
    """
    targets = config.value("target_modules")
    if any(config.value(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform")):
        return []
    in_blocks = [owner for owner in modules if owner != OUTPUT]
    if isinstance(targets, str):
        return in_blocks if targets == "all-linear" else []
    for target in targets:
        if not any(ends_with(owner, target) for owner in [*in_blocks, OUTPUT]):
            names = ", ".join(sorted({owner.rpartition(".")[2] for owner in modules}))
            raise LlamaError(f"{config.path}: target_modules has {shorten(target)}, expected names such as {names}")
    has_output = config.value("task_type") in (None, "CAUSAL_LM")  # other tasks have a head instead
    owners = modules if has_output else in_blocks
    return [owner for owner in owners if any(ends_with(owner, target) for target in targets)]


def ends_with(owner: str, name: str) -> bool:
    """Whether the module's name is this one or ends with it, at a dot."""
    return f".{owner}".endswith(f".{name}")
