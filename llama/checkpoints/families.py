"""The model families of Hugging Face's files, one record each: what tells one family's `config.json` from another's.

`hf_config`, `hf_head` and `inspect` read these records, and no code asks for a family by its name. To add a family,
from inside or outside of the package, put its record into FAMILIES before a checkpoint is opened:

    FAMILIES["mine"] = Family("mine", "Mine", "Mine", keys={"hidden_size": "n_embd"}, qkv_bias=True)

Knows names and sizes; knows no files and no tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..model import ModelArgs
from .task_spec import Body


@dataclass(frozen=True)
class Family:
    """A family of models that the network of `model.py` can be: the meaning of its files, and its names."""

    model_type: str  # in config.json; the record's key in FAMILIES
    class_stem: str  # of its classes in transformers: "Llama" of LlamaForCausalLM
    label: str  # for people
    versions: Mapping[tuple[str, float], str] = field(default_factory=dict)  # more exact labels, see `label_of`
    # Llama's key in config.json -> this family's, for those that differ. All other fields here use Llama's keys.
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of keys that a config.json lacks
    tensor_names: Mapping[str, str] = field(default_factory=dict)  # as in `huggingface.NAMES`, where they differ
    body: Body | None = None  # the prefix of the network's tensors in files; None: that of the task

    # What ModelArgs has. True or False: all models of the family; a text: those whose config.json sets this key.
    qkv_bias: bool | str = False
    wo_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False

    # None: queries see all positions. "all layers": `sliding_window` positions, null means all; in the layers of
    # `layer_types`, or without that key in all. "some layers": the same in the layers of `layer_types`, or without that
    # key in those from `max_window_layers` on; but only if `use_sliding_window` is set.
    window: Literal["all layers", "some layers"] | None = None

    # Whether a model of these sizes looks like one of this family, where no config.json names the family.
    resembles: Callable[[ModelArgs], bool] = lambda args: False

    def key(self, name: str) -> str:
        """This family's spelling of a key that Llama's config.json calls `name`."""
        return self.keys.get(name, name)

    def to_own_keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration in Llama's keys -> the same in this family's keys."""
        return _rename(values, self.keys)

    def to_llama_keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration in this family's keys -> the same in Llama's keys."""
        return _rename(values, {family_key: name for name, family_key in self.keys.items()})

    def label_of(self, args: ModelArgs) -> str:
        """The label of a model of these sizes: its version's, which the rotary embedding tells, or the family's.

        The keys of `versions` are ("default", rope_theta), or (type of the rotary scaling, its factor).
        """
        scaling = args.rope_scaling
        rotary = ("default", args.rope_theta) if scaling is None else (scaling.type, scaling.factor)
        return self.versions.get(rotary, self.label)


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys; a key that already has one of the new names means something else, and is left out."""
    new = set(names.values())
    return {names.get(key, key): value for key, value in values.items() if key in names or key not in new}


QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
LLAMA = Family(
    "llama",
    "Llama",
    "Llama",
    versions={
        ("default", 10000): "Llama 1 or 2",
        ("default", 500000): "Llama 3",
        ("llama3", 8): "Llama 3.1 or 3.3",
        ("llama3", 32): "Llama 3.2",
    },
    defaults={"max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    wo_bias="attention_bias",
    mlp_bias="mlp_bias",
)
MISTRAL = Family(
    "mistral",
    "Mistral",
    "Mistral",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    body="model",
    window="all layers",
    resembles=lambda args: args.sliding_window is not None,
)
# What transformers takes a `mistral` with `layer_types` for. Here both are read by the same rule.
MINISTRAL = replace(
    MISTRAL, model_type="ministral", class_stem="Ministral", label="Ministral", resembles=lambda args: False
)
QWEN2 = Family(
    "qwen2",
    "Qwen2",
    "Qwen2 or 2.5",
    defaults=QWEN_DEFAULTS,
    qkv_bias=True,
    window="some layers",
    resembles=lambda args: args.qkv_bias and not args.wo_bias,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    "Qwen3",
    defaults={**QWEN_DEFAULTS, "head_dim": 128},
    qkv_bias="attention_bias",
    wo_bias="attention_bias",
    qk_norm=True,
    window="some layers",
    resembles=lambda args: args.qk_norm,
)
# By model_type. A model without one is written as the first family that can hold it, so plainer families come first.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MINISTRAL)}


def label_of(args: ModelArgs, family: Family | None) -> str:
    """The published models that a checkpoint belongs to, as a label for people; nothing depends on it.

    family: None where the checkpoint doesn't name it. Then the last family that such sizes resemble is taken, or Llama.
    """
    if family is not None:
        return family.label_of(args)
    alike = [family for family in FAMILIES.values() if family.resembles(args)]
    return (alike[-1] if alike else LLAMA).label_of(args)
