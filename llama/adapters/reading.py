"""An adapter's directory, as peft writes it -> an `Adapter`: what it changes in which tensor of the base.

Knows names, shapes and the layout of peft's files; changes no model. What the configuration means is in `peft_config`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .._util.files import check_expanded
from .._util.urls import HUB_NAME, say_download
from ..checkpoints.config_values import Config
from ..checkpoints.families import FAMILIES, Family
from ..checkpoints.huggingface import hf_name, module_names, read_file
from ..checkpoints.schema import Stored, is_linear, is_rotary, tensor_shapes
from ..checkpoints.task_spec import Body
from ..errors import LlamaError, pluralize, shorten
from ..model import ModelArgs
from .matching import Matcher
from .peft_config import (
    CONFIG,
    Start,
    read_adapter_config,
    read_dropout,
    read_sizes,
    read_start,
    read_token_rows,
    select_targets,
)

TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."  # peft's prefix of all names of the model that it wraps
EMBEDDING, OUTPUT = "tok_embeddings", "output"
MATRICES = (f"{EMBEDDING}.weight", f"{OUTPUT}.weight")  # those with a row for each token
# The end of a key -> what the tensor is called here. The embedding's A and B have other shapes, and so other names.
KINDS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",
}
ADAPTED = re.compile(rf"(.+)\.({'|'.join(map(re.escape, KINDS))})")
TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
TRAINING_ONLY = re.compile(r".+\.lora_velora_embed")  # what VeLoRA computes gradients with
# What peft's wrappers put between the name of a module and that of its tensor.
WRAPPED = re.compile(
    r"(.+?)(?:\.(base_layer|token_adapter\.base_layer|original_module|modules_to_save))?\.(weight|bias)"
)


@dataclass
class Adapter:
    """What an adapter's directory holds. Tensors and modules have Meta's names."""

    directory: Path
    args: ModelArgs  # of the model with the adapter: the base's, maybe with other words, or no longer tied
    spelling: "Spelling"  # how its files call modules
    dropout: float
    start: Start | None  # what was taken out of the base's matrices that have A and B
    sizes: dict[str, tuple[int, float]] = field(default_factory=dict)  # (r, alpha) of each module with A and B
    tensors: dict[str, Stored] = field(default_factory=dict)  # by names such as `layers.0.attention.wq.lora_A`
    base_tensors: dict[str, Stored] = field(default_factory=dict)  # that take the place of the base's
    tokens: dict[str, tuple[list[int], Stored]] = field(default_factory=dict)  # rows of MATRICES, and what they become
    extra: dict[str, Tensor] = field(default_factory=dict)  # tensors of a head, by transformers' names
    others: dict[str, Tensor] = field(default_factory=dict)  # all that isn't A and B of linear layers, as in the file
    settings: dict[str, Any] = field(default_factory=dict)  # what the configuration says about `others`


@dataclass(frozen=True)
class Spelling:
    """How transformers calls the modules of a model."""

    body: str  # the prefix of the network's modules; "" of a model without a head
    names: Mapping[str, str]  # as `huggingface.NAMES`

    def tensor(self, name: str) -> str:
        return hf_name(name, self.body, self.names).removeprefix(".")

    def module(self, name: str) -> str:
        return self.tensor(f"{name}.weight").removesuffix(".weight")


def check_adapter_dir(directory: Path) -> None:
    """Raise LlamaError, with the next step, where there is nothing at all."""
    check_expanded(directory)
    if not directory.exists():
        is_name = re.fullmatch(HUB_NAME, str(directory)) and not directory.parent.exists()
        step = f"; as a name on the Hugging Face Hub: {say_download(str(directory))}" if is_name else ""
        raise LlamaError(
            f"adapter_dir {directory}: found nothing there, expected an adapter's directory, with {CONFIG} and "
            f"{TENSORS}{step}"
        )


def read_adapter(directory: str | Path, args: ModelArgs, family: Family | None = None) -> Adapter:
    """The content of the directory. args: of the base. family: of the base; None: the file's names tell it.

    Raises LlamaError unless all of it fits the base.
    """
    if not isinstance(directory, str | Path):
        raise LlamaError(f"adapter_dir is {shorten(directory)}, expected the path of an adapter's directory")
    directory = Path(directory)
    check_adapter_dir(directory)
    for name in (CONFIG, TENSORS):
        if not (directory / name).exists():
            older = "; adapter_model.bin is the older form: save it anew with peft"
            raise LlamaError(
                f"{directory / name} is missing: expected an adapter's directory, with {CONFIG} and {TENSORS}"
                + older * (directory / "adapter_model.bin").is_file()
            )
    config, tensors = read_adapter_config(directory / CONFIG), read_file(directory / TENSORS)
    spelling = find_spelling(tensors, args, family)
    adapter = Adapter(directory, args, spelling, read_dropout(config), read_start(config))
    problems = Reader(adapter, config).read(tensors)
    if problems:
        more = f"; and {pluralize(len(problems) - 5, 'more problem')}" if len(problems) > 5 else ""
        raise LlamaError(
            f"{directory / TENSORS} doesn't fit {CONFIG} and the model: {'; '.join(problems[:5])}{more}. Is it of this "
            "model?"
        )
    return adapter


def find_spelling(tensors: Mapping[str, Tensor], args: ModelArgs, family: Family | None) -> Spelling:
    """The spelling that explains most of a file's names."""
    families = [None, *FAMILIES.values()] if family is None else [family]
    # A model without a head comes last: its names are the ends of others'.
    spellings = [Spelling(body, module_names(one)) for body in (*get_args(Body), "") for one in families]
    modules = [name.rpartition(".")[0] for name in tensor_shapes(args)]

    def count(spelling: Spelling) -> int:
        known = {ROOT + spelling.module(module) for module in modules}
        starts = (accumulate(key.split("."), "{}.{}".format) for key in tensors)
        return sum(not known.isdisjoint(names) for names in starts)

    return max(spellings, key=count)


def untied(args: ModelArgs) -> ModelArgs:
    return replace(args, tied_embeddings=False)


class Reader:
    """Puts the tensors of a file where they belong in an adapter."""

    def __init__(self, adapter: Adapter, config: Config):
        self.adapter, self.config, self.args = adapter, config, adapter.args
        spelling = adapter.spelling
        self.shapes = tensor_shapes(untied(self.args))
        self.base = {spelling.tensor(name): name for name in self.shapes}
        linear = [name.removesuffix(".weight") for name in self.shapes if is_linear(name)]
        self.modules = {spelling.module(name): name for name in [*linear, EMBEDDING]}
        self.matcher = Matcher(config.path, list(self.modules))
        self.saved = config.value("modules_to_save") or []
        # The base's tensors in the file: of each its Stored by the wrapper in its name, "" without one.
        self.found: dict[str, dict[str, Stored]] = {}
        self.problems: list[str] = []

    def read(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Fill the adapter. Returns what is wrong with the file."""
        deltas: dict[str, Stored] = {}
        for key, tensor in tensors.items():
            self.sort(key, tensor, deltas)
        self.resize()
        self.read_modules()
        self.place_base_tensors()
        self.place_tokens(deltas)
        adapter = self.adapter
        if self.args.tied_embeddings and not self.is_tied():
            adapter.args = untied(adapter.args)
        self.find_missing()
        for name in ("init_lora_weights", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"):
            if adapter.others or adapter.start:
                adapter.settings[name] = self.config.value(name)
        if not (adapter.tensors or adapter.base_tensors or adapter.tokens):
            return ["no layer has an adapter", *self.problems]
        return self.problems

    def sort(self, key: str, tensor: Tensor, deltas: dict[str, Stored]) -> None:
        """Put one tensor where it belongs, without a look at its shape."""
        adapter, name = self.adapter, key.removeprefix(ROOT) if key.startswith(ROOT) else ""
        if (match := ADAPTED.fullmatch(name)) and match[1] in self.modules:
            module, kind = self.modules[match[1]], KINDS[match[2]]
            if ("embedding" in match[2]) == (module == EMBEDDING) or kind == "lora_magnitude":
                adapter.tensors[f"{module}.{kind}"] = self.store(f"{module}.{kind}", key, tensor)
                if module == EMBEDDING:
                    adapter.others[key] = tensor
                return
        elif (match := TOKENS.fullmatch(name)) and self.modules.get(match[1]) in (EMBEDDING, OUTPUT):
            deltas[f"{self.modules[match[1]]}.weight"] = Stored(key, (tensor,))
            adapter.others[key] = tensor
            return
        elif (match := WRAPPED.fullmatch(name)) and (meta := self.base.get(f"{match[1]}.{match[3]}")):
            self.found.setdefault(meta, {})[match[2] or ""] = self.store(meta, key, tensor)
            adapter.others[key] = tensor
            return
        elif "." in name and name.split(".")[0] in self.saved:
            adapter.extra[name] = tensor.clone()
            return
        elif TRAINING_ONLY.fullmatch(name):
            return
        self.problems.append(f"surplus {shorten(key, 120)}")

    def store(self, name: str, key: str, tensor: Tensor) -> Stored:
        """The tensor, with rotary rows in Hugging Face's order. name: Meta's."""
        is_permuted = is_rotary(name) and not name.endswith("lora_A")
        fits = tensor.ndim > 0 and len(tensor) % self.args.head_size == 0
        return Stored(key, (tensor,), hf_head_dim=self.args.head_size if is_permuted and fits else None)

    # --- shapes -----------------------------------------------------------------------------------------------------

    def resize(self) -> None:
        """Take over the number of words, if the embedding and the output layer in the file have another one."""
        given = {name: list(self.found[name].values()) for name in MATRICES if name in self.found}
        counts = {stored.shape[0] for values in given.values() for stored in values if len(stored.shape) == 2}
        if counts and counts != {self.args.vocab_size}:
            if len(counts) > 1:
                self.problems.append(f"matrices of {' and '.join(map(str, sorted(counts)))} words")
            words = max(counts)
            absent = [name for name in MATRICES if name not in given]
            if absent and not (self.args.tied_embeddings and given):
                missing = self.adapter.spelling.tensor(absent[0])
                self.problems.append(
                    f"missing {ROOT}{missing}, whose rows of {words} words aren't in the base either: save it with "
                    "peft's save_pretrained(save_embedding_layers=True) or modules_to_save"
                )
            self.adapter.args = replace(self.args, vocab_size=words)
        self.shapes = tensor_shapes(untied(self.adapter.args))

    def check(self, stored: Stored, expected: tuple[int, ...]) -> None:
        if stored.shape != expected:
            self.problems.append(f"{stored.name} of shape {stored.shape}, expected {expected}")
        elif not stored.dtype.is_floating_point:
            self.problems.append(f"{stored.name} of {stored.dtype}, expected numbers with a fraction")

    def read_modules(self) -> None:
        """The sizes of the modules with A and B, and what is wrong with their tensors."""
        adapter, module_of = self.adapter, self.modules
        linear = [owner for owner, module in module_of.items() if module not in (EMBEDDING, OUTPUT)]
        targets = {module_of[owner] for owner in select_targets(self.config, self.matcher, linear)}
        if self.config.value("task_type") not in (None, "CAUSAL_LM") and f"{OUTPUT}.lora_A" not in adapter.tensors:
            targets.discard(OUTPUT)  # a model of another task mostly has a head instead
        if self.config.flag("ensure_weight_tying") and self.args.tied_embeddings and EMBEDDING in targets:
            targets.add(OUTPUT)  # peft then gives it the embedding's A and B, and writes both
        if self.config.flag("lora_bias") and targets & {EMBEDDING, OUTPUT}:
            raise self.config.error("lora_bias", True, "false, since the embedding or the output layer is a target")
        kinds = ["lora_A", "lora_B"]
        kinds += ["lora_magnitude"] * self.config.flag("use_dora") + ["lora_bias"] * self.config.flag("lora_bias")
        owners = {module: owner for owner, module in module_of.items()}
        sizes = read_sizes(self.config, self.matcher, [owners[m] for m in owners if m in targets])
        adapter.sizes = {module_of[owner]: size for owner, size in sizes.items()}
        for module, (r, _) in adapter.sizes.items():
            for kind in kinds:
                stored = adapter.tensors.get(f"{module}.{kind}")
                if stored is None:
                    self.problems.append(f"missing {ROOT}{owners[module]}.{spell_kind(kind, module)}")
                else:
                    self.check(stored, shape_of(kind, r, self.shapes[f"{module}.weight"], module == EMBEDDING))
        for name, stored in adapter.tensors.items():
            module, _, kind = name.rpartition(".")
            if module not in targets or kind not in kinds:
                self.problems.append(f"surplus {shorten(stored.name, 120)}, which {CONFIG} doesn't ask for")

    # --- tensors of the base ----------------------------------------------------------------------------------------

    def place_base_tensors(self) -> None:
        """What takes the place of the base's tensors."""
        for name, given in self.found.items():
            for stored in given.values():
                self.check(stored, self.shapes[name])
        if self.args.tied_embeddings:
            return self.place_tied_matrices()
        for name in self.found:
            chosen = self.own(name) or self.of_base(name)
            if chosen is not None:
                self.adapter.base_tensors[name] = chosen

    def is_saved(self, name: str) -> bool:
        """Whether the tensor's module is one of `modules_to_save`, by the end of its name or of one that it lies in."""
        parts = self.adapter.spelling.tensor(name).split(".")[:-1]
        return any(".".join(parts[:i]).endswith(m) for m in self.saved for i in range(1, len(parts) + 1))

    def own(self, name: str) -> Stored | None:
        """The tensor of a module that was trained as a whole, a copy of the base's."""
        given = self.found.get(name, {})
        return given.get("modules_to_save") or (given.get("") if self.is_saved(name) else None)

    def of_base(self, name: str) -> Stored | None:
        """The base's own tensor, which was written too."""
        given = self.found.get(name, {})
        plain = None if self.is_saved(name) else given.get("")
        return plain or given.get("base_layer") or given.get("token_adapter.base_layer")

    def place_tied_matrices(self) -> None:
        """As `place_base_tensors`, where the output layer uses the embedding's matrix.

        A copy that was trained is that of one of both; what is written of the base is the matrix of both.
        """
        adapter, originals = self.adapter, [self.found.get(name, {}).get("original_module") for name in MATRICES]
        written = [stored for name in MATRICES if (stored := self.of_base(name)) is not None]
        if len(written) == 2 and not are_same(*written):
            self.problems.append(f"{written[1].name} differs from {written[0].name}, which the base has as one matrix")
        shared = next((stored for stored in [*written, *originals] if stored is not None), None)
        for name in MATRICES:
            chosen = self.own(name) or shared
            if chosen is not None:
                adapter.base_tensors[name] = chosen
        for name in self.found.keys() - {*MATRICES}:
            chosen = self.own(name) or self.of_base(name)
            if chosen is not None:
                adapter.base_tensors[name] = chosen

    def place_tokens(self, deltas: Mapping[str, Stored]) -> None:
        adapter, spelling = self.adapter, self.adapter.spelling
        named = {spelling.module(name.removesuffix(".weight")): name for name in MATRICES}
        rows = read_token_rows(self.config, named)
        for name, stored in deltas.items():
            indices = rows.get(name, [])
            self.check(stored, (len(indices), self.args.dim))
            if any(index >= adapter.args.vocab_size for index in indices):
                self.problems.append(f"trainable_token_indices has {max(indices)}, above the last word")
            adapter.tokens[name] = indices, stored
        if self.args.tied_embeddings and MATRICES[0] in deltas and MATRICES[1] not in deltas:
            adapter.tokens[MATRICES[1]] = adapter.tokens[MATRICES[0]]
        for name in rows.keys() - adapter.tokens.keys():
            key = f"{ROOT}{spelling.tensor(name).removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
            self.problems.append(f"missing {key}")

    def is_tied(self) -> bool:
        """Whether the adapter does the same to the embedding and the output layer, which the base has as one matrix."""
        adapter = self.adapter
        if adapter.sizes.keys() & {EMBEDDING, OUTPUT}:
            return False
        first, second = (adapter.base_tensors.get(name) for name in MATRICES)
        same_tokens = adapter.tokens.get(MATRICES[0]) is adapter.tokens.get(MATRICES[1])
        return same_tokens and are_same(first, second)

    def find_missing(self) -> None:
        """The tensors that have to be in the file, of `modules_to_save` and of a tied matrix, and aren't."""
        for name in self.shapes:
            is_absent = self.own(name) is None and self.is_saved(name)
            has_place = name in tensor_shapes(self.args) or name == MATRICES[1]
            if is_absent and has_place:
                self.problems.append(f"missing {ROOT}{self.adapter.spelling.tensor(name)}")
        is_changed = self.args.tied_embeddings and self.adapter.start is not None and OUTPUT in self.adapter.sizes
        if is_changed and MATRICES[0] not in self.adapter.base_tensors:
            self.problems.append(
                f"missing {ROOT}{self.adapter.spelling.module(OUTPUT)}.base_layer.weight, the matrix of the embedding "
                "too that the training began with: save it with peft's save_pretrained(save_embedding_layers=True)"
            )


def are_same(a: Stored | None, b: Stored | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.pieces[0], b.pieces[0])


def shape_of(kind: str, r: int, shape: tuple[int, ...], is_embedding: bool) -> tuple[int, ...]:
    """The shape of an adapter's tensor. shape: of the module's matrix; peft counts the embedding as transposed."""
    rows, columns = shape[::-1] if is_embedding else shape
    return {"lora_A": (r, columns), "lora_B": (rows, r)}.get(kind, (rows,))


def spell_kind(kind: str, module: str) -> str:
    """peft's name of an adapter's tensor."""
    names = {"lora_bias": "lora_B.bias", "lora_magnitude": "lora_magnitude_vector"}
    plain = f"lora_embedding_{kind[-1]}" if module == EMBEDDING else f"{kind}.weight"
    return names.get(kind, plain)
