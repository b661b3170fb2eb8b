"""peft's `adapter_config.json`: which modules an adapter changes, and how. What can't be honoured is refused by name.

Knows no tensors. The rules by which names and patterns are matched are in `matching`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .._util.files import read_json
from .._util.validate import is_integer, is_number
from ..checkpoints.config_values import Config
from ..errors import LlamaError, shorten
from .matching import Matcher

CONFIG = "adapter_config.json"
# What was taken out of the base's matrices before the training, so that it can be again.
Start = Literal["pissa", "olora"]
# The keys that are read here, and those that don't change what the tensors mean: they are of the training's start, of
# its gradients or of its place. Every other key must be null, false or empty, since it may change what is computed.
READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias"}
READ |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
READ |= {"modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"}
IGNORED = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config"}
IGNORED |= {"megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config"}
IGNORED |= {"velora_config"}
# Why other keys of peft's are refused, if they are set.
REFUSED = {
    "megatron_config": "layers of Megatron's",
    "alora_invocation_tokens": "an adapter that acts from certain tokens on (aLoRA)",
    "layer_replication": "layers that stand in the model several times",
    "target_parameters": "adapters on parameters, such as those of experts",
    "use_qalora": "inputs that are pooled (QA-LoRA)",
    "use_bdlora": "matrices of blocks (BD-LoRA)",
    "arrow_config": "a choice between adapters for each token (Arrow)",
    "kasa_config": "a base without its smallest singular values (KaSA)",
    "monteclora_config": "random samples of weights (MonteCLoRA)",
    "fan_in_fan_out": "transposed matrices",
}
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # they leave the base's weights alone
MERGE = "let peft merge it into its model (merge_and_unload, then save_pretrained), and load that"


def read_adapter_config(path: Path) -> Config:
    """The configuration. Raises LlamaError for what can't be honoured, and for values of wrong types."""
    config = Config(path, read_json(path, "an adapter's configuration"), {})
    if config.value("peft_type") != "LORA":
        raise config.error("peft_type", config.value("peft_type"), f"'LORA': of another adapter, {MERGE}")
    if config.value("bias", "none") not in ("none", "all", "lora_only"):
        raise config.error("bias", config.value("bias"), "'none', 'all' or 'lora_only'")
    for key in sorted(config.values.keys() - READ - IGNORED):
        if config.value(key):
            kind = f"{REFUSED[key]} aren't read" if key in REFUSED else "it isn't known here"
            raise config.error(shorten(key), config.value(key), f"null or false, as in plain LoRA: {kind}; {MERGE}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.value(key) or {}, dict):
            raise config.error(key, config.value(key), "a dict of numbers by names of layers, or null")
    check_names(config, "modules_to_save", ())
    check_names(config, "exclude_modules", ("",))
    check_names(config, "layers_pattern", ("",))
    targets = config.value("target_modules")
    if not isinstance(targets, list | str) or targets == "":
        raise config.error("target_modules", targets, "a list of names of layers, or a pattern")
    if isinstance(targets, str) and (config.value("layers_to_transform") is not None or config.value("layers_pattern")):
        raise config.error("target_modules", targets, "a list, since layers_to_transform or layers_pattern is set")
    if config.flag("use_dora") and config.flag("lora_bias"):
        raise config.error("lora_bias", True, "false, since use_dora is true: peft has no such adapters")
    config.flag("ensure_weight_tying")
    read_start(config)
    return config


def check_names(config: Config, key: str, alternatives: tuple[str, ...]) -> None:
    """Raise LlamaError unless the value is a list of names or null. alternatives: ("",): it may be one text too."""
    value = config.value(key)
    is_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not (value is None or is_names or (alternatives and isinstance(value, str))):
        raise config.error(key, value, f"a list of names{', a pattern' * bool(alternatives)} or null")


def read_start(config: Config) -> Start | None:
    """What the training began with, if it changed the base's matrices in a way that can be computed again from them."""
    value = config.value("init_lora_weights")
    name = value.lower() if isinstance(value, str) else value
    if name is None or isinstance(name, bool) or name in HARMLESS_STARTS:
        return None
    for start in get_args(Start):
        if name == start:
            return start
    raise config.error(
        "init_lora_weights",
        value,
        f"one of true, false, {', '.join((*HARMLESS_STARTS, *get_args(Start)))}: the matrices that this start has put "
        "in the place of the base's aren't in the file. Save the adapter with peft's save_pretrained("
        "path_initial_model_for_weight_conversion=...), which makes it plain LoRA",
    )


def read_dropout(config: Config) -> float:
    value = config.value("lora_dropout", 0.0)
    if not is_number(value) or not 0 <= value < 1:
        raise config.error("lora_dropout", value, "a number in [0, 1)")
    return value


def read_sizes(config: Config, matcher: Matcher, owners: Collection[str]) -> dict[str, tuple[int, float]]:
    """(r, alpha) of the modules `owners`, by transformers' names. B A is scaled by alpha / r.

    `use_rslora` scales it by alpha / sqrt(r) (arXiv:2312.03732); alpha includes the difference.
    """
    ranks, alphas = config.value("rank_pattern") or {}, config.value("alpha_pattern") or {}
    rank_keys = matcher.first_pattern("rank_pattern", ranks)
    alpha_keys = matcher.first_pattern("alpha_pattern", alphas)
    sizes = {}
    for owner in owners:
        r = ranks[rank_keys[owner]] if owner in rank_keys else config.count("r")
        alpha = alphas[alpha_keys[owner]] if owner in alpha_keys else config.value("lora_alpha")
        sizes[owner] = check_size(config, r, alpha)
    return sizes


def check_size(config: Config, r: Any, alpha: Any) -> tuple[int, float]:
    if not is_integer(r, 1) or not is_number(r):
        raise config.error("r", r, "a whole number of at least 1")
    if not is_number(alpha) or alpha <= 0 or not is_number(alpha * r**0.5):
        raise config.error("lora_alpha", alpha, "a number above 0")
    return r, alpha * r**0.5 if config.flag("use_rslora") else alpha


def select_targets(config: Config, matcher: Matcher, linear: Collection[str]) -> set[str]:
    """The modules that have A and B, by peft's rules.

    matcher: knows all modules that can have an adapter: linear layers and the embedding. linear: those in the layers,
    which "all-linear" means.
    """
    targets = config.value("target_modules")
    if isinstance(targets, str):
        is_all = targets.lower() == "all-linear"
        selected = set(linear) if is_all else matcher.matching_fully("target_modules", targets)
    else:
        # A name of which there is no module means nothing, as in peft; but one of them must mean something.
        wrong = [target for target in targets if not isinstance(target, str) or not matcher.ending_with([target])]
        if wrong and (len(wrong) == len(targets) or not all(isinstance(target, str) for target in targets)):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in matcher.names}))
            raise LlamaError(f"{config.path}: target_modules has {shorten(wrong[0])}, expected names such as {names}")
        # Full names are meant as they are, whatever layers are to be transformed, as in peft.
        selected = select_layers(config, matcher, matcher.ending_with(targets)) | {*targets}.intersection(matcher.names)
    excluded = config.value("exclude_modules")
    if isinstance(excluded, str) and excluded:
        selected -= matcher.matching_fully("exclude_modules", excluded)
    elif excluded:
        selected -= matcher.ending_with(excluded)
    saved = config.value("modules_to_save") or []
    return selected - matcher.inside("modules_to_save", saved)


def select_layers(config: Config, matcher: Matcher, selected: set[str]) -> set[str]:
    """Those of the selected modules that are in the layers of `layers_to_transform`; all of them if it isn't set."""
    layers = config.value("layers_to_transform")
    if layers is None or layers == []:
        return selected
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(is_integer(number) for number in numbers):
        raise config.error("layers_to_transform", layers, "a number of a layer, a list of them, or null")
    patterns = config.value("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = matcher.layer_numbers("layers_pattern", patterns)
    return {name for name in selected if found.get(name) in numbers}


def read_token_rows(config: Config, matrices: Mapping[str, str]) -> dict[str, list[int]]:
    """The rows that `trainable_token_indices` names, by Meta's names of the matrices. A list is of the embedding.

    matrices: transformers' name of the embedding and of the output layer -> Meta's name of the matrix.
    """
    value = config.value("trainable_token_indices")
    if value is None:
        return {}
    embedding = next(iter(matrices))
    rows: dict[str, list[int]] = {}
    for key, indices in (value if isinstance(value, dict) else {embedding: value}).items():
        owner = next((name for name in matrices if name.endswith(key)), None)
        is_rows = isinstance(indices, list) and all(is_integer(i, 0) for i in indices)
        if owner is None or not is_rows or len(set(indices)) != len(indices):
            expected = f"a list of different tokens, or such lists by {' and '.join(matrices)}"
            raise config.error("trainable_token_indices", value, expected)
        rows[matrices[owner]] = indices
    return rows
