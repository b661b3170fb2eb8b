"""Adapters of a built model to and from files, as the peft library has them (https://huggingface.co/docs/peft).

Knows a model's layers, on any number of ranks. What an adapter computes is in `lora`, what its files hold in `reading`.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import parallel
from .._util.files import make_unfinished_directory, write_json
from ..checkpoints.families import Family
from ..checkpoints.huggingface import module_names
from ..checkpoints.loader import place_tensor
from ..checkpoints.schema import Stored, is_rotary, permute_rotary, ranks_per_part, split_dim
from ..checkpoints.task_spec import Body
from ..errors import LlamaError, shorten, to_one_line
from ..model import ModelArgs, Transformer
from .lora import (
    KINDS,
    LoraLinear,
    attach_adapter,
    check_plain,
    copy_part,
    linear_modules,
    lora_layers,
    lora_parameters,
)
from .merging import changed_tensors, find_change, read_dense
from .peft_config import CONFIG
from .reading import EMBEDDING, ROOT, TENSORS, Adapter, Spelling, read_adapter, spell_kind

PeftTask = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]


# --- writing --------------------------------------------------------------------------------------------------------


def save_adapter(
    model: Transformer,
    directory: str | os.PathLike,
    base: str = "",
    *,
    extra: Mapping[str, Tensor] | None = None,
    task_type: PeftTask = "CAUSAL_LM",
    prefix: Body = "model",
    family: Family | None = None,
) -> None:
    """Write the model's adapter, whole or not at all, over any adapter there. Called on all ranks.

    base: the name or path by which peft's users load the model that it belongs to. extra: tensors of a head, whole and
    equal on every rank, by transformers' names such as "score.weight": peft's `modules_to_save`. prefix: transformers'
    name of the network below the head: "transformer" in its question answering, else "model". family: whose names the
    modules get; None: those of the file that the adapter was loaded from, or else Llama's.
    Raises LlamaError, on all ranks, if there is no adapter or it can't be written.
    """
    with parallel.raise_together():
        layers = lora_layers(model)
        for name, value, choices in (("task_type", task_type, PeftTask), ("prefix", prefix, Body)):
            if value not in get_args(choices):
                raise LlamaError(f"{name} is {shorten(value)}, expected one of {', '.join(get_args(choices))}")
        head = dict(extra or {})
        check_head(head)
        origin = next(iter(layers.values())).origin
        spelling = choose_spelling(origin, prefix, family)
    tensors = {ROOT + name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.items()}
    for name, parameter in lora_parameters(model).items():
        module, _, kind = name.rpartition(".")
        key = f"{ROOT}{spelling.module(module)}.{spell_kind(kind, module)}"
        tensors[key] = gather_whole(name, parameter.detach(), model.params)
    saved = sorted({name.rpartition(".")[0] for name in head})
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        **describe_sizes(layers, model.params, spelling),
        "modules_to_save": saved or None,
        "bias": "none",
        "inference_mode": True,
    }
    if origin is not None:
        tensors |= {key: tensor.clone() for key, tensor in origin.others.items()}
        config |= origin.settings
        config["modules_to_save"] = sorted({*saved, *(origin.settings.get("modules_to_save") or [])}) or None
    with parallel.raise_together():
        if parallel.is_main_process():
            write_adapter(Path(directory), tensors, config)


def choose_spelling(origin: Adapter | None, prefix: Body, family: Family | None) -> Spelling:
    """How modules are called in a file. origin: what the adapter was loaded from, if it was."""
    if origin is not None and family is None and prefix == "model":
        return origin.spelling
    spelling = Spelling(prefix, module_names(family))
    if origin is not None and origin.others and spelling != origin.spelling:
        raise LlamaError(
            f"the adapter of {origin.directory} holds tensors of the base by other names than those of prefix "
            f"{prefix!r} and this family: write it with those that it was loaded with"
        )
    return spelling


def check_head(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        named = isinstance(name, str) and re.fullmatch(r"[\w.]+\.(weight|bias)", name)
        if not isinstance(tensor, Tensor) or not named:
            raise LlamaError(f"extra has {shorten(name)}: expected tensors by names such as score.weight")


def gather_whole(name: str, part: Tensor, args: ModelArgs) -> Tensor:
    """The whole tensor from every rank's part, on the CPU, with rotary pairs in Hugging Face's order."""
    whole = gather_ranks(name, part, args).cpu().contiguous()
    head_dim = rotary_head_dim(name, args)
    return whole if head_dim is None else permute_rotary(whole, head_dim, "hf")


def gather_ranks(name: str, part: Tensor, args: ModelArgs) -> Tensor:
    """The whole tensor from every rank's part, on all ranks."""
    dim, mp_size = split_dim(name), get_model_parallel_world_size()
    if dim is None or mp_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(mp_size)]
    dist.all_gather(parts, part.contiguous(), group=parallel.group())
    return torch.cat(parts[:: ranks_per_part(name, args, mp_size)], dim)


def describe_sizes(layers: Mapping[str, LoraLinear], args: ModelArgs, spelling: Spelling) -> dict[str, Any]:
    """The keys of `adapter_config.json` that say which modules have an adapter, and of which kind and sizes."""
    some = next(iter(layers.values()))
    sizes = {module: (layer.r, layer.alpha) for module, layer in layers.items()}
    if some.origin is not None and EMBEDDING in some.origin.sizes:
        sizes[EMBEDDING] = some.origin.sizes[EMBEDDING]
    names = {module: spelling.module(module) for module in sizes}
    kinds = {name.rpartition(".")[2] for name in names.values()}
    every = [*linear_modules(args), EMBEDDING]
    of_kinds = [module for module in every if spelling.module(module).rpartition(".")[2] in kinds]
    r, alpha = Counter(sizes.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": simplify_number(alpha),
        "lora_dropout": some.dropout,
        "use_dora": any(layer.lora_magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "target_modules": sorted(kinds) if len(of_kinds) == len(sizes) else list(names.values()),
        "rank_pattern": {names[module]: size[0] for module, size in sizes.items() if size[0] != r},
        "alpha_pattern": {names[m]: simplify_number(size[1]) for m, size in sizes.items() if size[1] != alpha},
    }


def simplify_number(value: float) -> float:
    """An int if it is a whole number, as peft declares alpha."""
    return int(value) if value == int(value) else value


def write_adapter(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    try:
        with make_unfinished_directory(directory) as unfinished:
            save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})
            write_json(unfinished / CONFIG, config)
            (directory / CONFIG).unlink(missing_ok=True)  # without it, nobody reads a half-replaced adapter
            for name in (TENSORS, CONFIG):
                (unfinished / name).chmod(0o644)
                os.replace(unfinished / name, directory / name)
            unfinished.rmdir()
    except (OSError, RuntimeError, SafetensorError) as e:
        raise LlamaError(f"{directory} can't be written ({to_one_line(e)}): expected a directory, or nothing") from e


# --- names ----------------------------------------------------------------------------------------------------------


def rotary_head_dim(name: str, args: ModelArgs) -> int | None:
    """head_dim if the tensor's rows are rotated by position, so that files have them in Hugging Face's order."""
    return args.head_size if is_rotary(name) and not name.endswith("lora_A") else None


# --- loading --------------------------------------------------------------------------------------------------------


def load_adapter(
    model: Transformer, directory: str | os.PathLike, *, family: Family | None = None
) -> dict[str, Tensor]:
    """Put the adapter in `directory` on a model, on any number of ranks.

    A and B are kept apart from the weights; what else the adapter changes (embeddings, norms, rows of tokens, matrices
    of another start than zero) is changed in the model. The model is then in evaluation mode, with all parameters but
    the adapter's frozen; `model.train()` lets the adapter be trained further.
    family: the model's, if its modules have other names than the file's names tell. Returns the whole tensors of a head
    that the files hold (peft's `modules_to_save`), by transformers' names. Raises LlamaError, and leaves the model as
    it was, for files that are missing, broken or of another model, for what can't be honoured, for an adapter that
    needs a model of other sizes, and for a model that has an adapter.
    """
    with parallel.raise_together():
        adapter = read_adapter(os.fspath(directory), model.params, family)
        check_plain(model, linear_layers(adapter))
        check_sizes(model, adapter)
    change_base(model, adapter)
    attach(model, adapter)
    return adapter.extra


def linear_layers(adapter: Adapter) -> list[str]:
    """The layers that get A and B."""
    return [module for module in adapter.sizes if module != EMBEDDING]


def check_sizes(model: Transformer, adapter: Adapter) -> None:
    """Raise LlamaError for an adapter that changes more than a built model's weights."""
    base, args = model.params, adapter.args
    changes = []
    if args.vocab_size != base.vocab_size:
        changes.append(f"the number of words from {base.vocab_size} to {args.vocab_size}")
    if args.tied_embeddings != base.tied_embeddings:
        changes.append("the embedding or the output layer alone, which are one matrix here")
    if changes:
        raise LlamaError(
            f"{adapter.directory} changes {' and '.join(changes)}: build the model with it "
            "(Llama.build or TaskModel.build, adapter_dir=...)"
        )


@torch.no_grad()
def change_base(model: Transformer, adapter: Adapter) -> None:
    """Change what the adapter changes in the model's own tensors. Called on all ranks."""
    args, rank, ranks = model.params, get_model_parallel_rank(), get_model_parallel_world_size()
    for name in changed_tensors(adapter, merge=False):
        parameter = model.get_parameter(name)
        replacement, change = adapter.base_tensors.get(name), find_change(adapter, name, merge=False)
        whole = gather_ranks(name, parameter.detach(), args) if replacement is None else replacement.read()
        rows = read_dense(whole) if change is None else change(read_dense(whole))
        part = Stored(name, (rows(0, len(whole)),)).part(args, rank, ranks, name).to(parameter)
        if not torch.equal(part, parameter):
            place_tensor(model, name, part.contiguous())


def attach(model: Transformer, adapter: Adapter) -> None:
    """Put A and B, and what goes with them, on the layers of a model whose other tensors have the adapter's changes."""
    model.requires_grad_(False)
    for module in linear_layers(adapter):
        kinds = [kind for kind in KINDS if f"{module}.{kind}" in adapter.tensors]
        attach_adapter(model, module, *adapter.sizes[module], adapter.dropout, kinds).origin = adapter
        for kind in kinds:
            copy_part(model, f"{module}.{kind}", adapter.tensors[f"{module}.{kind}"])
    model.eval()
