"""An adapter's files, as the peft library reads and writes them (https://huggingface.co/docs/peft).

Knows names and shapes, on any number of ranks. What an adapter computes is in `lora`, what its configuration means in
`peft_config`.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ..checkpoints.hf_config import Config
from ..checkpoints.huggingface import hf_name, read_file
from ..checkpoints.schema import Stored, is_rotary, permute_rotary, ranks_per_part, split_dim, tensor_shapes
from ..checkpoints.task_spec import Body
from ..errors import LlamaError, pluralize, shorten, to_one_line
from ..model import ModelArgs, Transformer
from .lora import LoraLinear, attach_adapter, check_plain, copy_part, linear_modules, lora_layers, lora_parameters
from .peft_config import read_adapter_config, read_dropout, read_size, select_targets

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."  # peft's prefix of all names of the model that it wraps
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
) -> None:
    """Write the model's adapter, whole or not at all, over any adapter there. Called on all ranks.

    base: the name or path by which peft's users load the model that it belongs to. extra: tensors of a head, whole and
    equal on every rank, by transformers' names such as "score.weight": peft's `modules_to_save`. prefix: transformers'
    name of the network below the head: "transformer" in its question answering, else "model".
    Raises LlamaError, on all ranks, if there is no adapter or it can't be written.
    """
    with parallel.raise_together():
        layers = lora_layers(model)
        for name, value, choices in (("task_type", task_type, PeftTask), ("prefix", prefix, Body)):
            if value not in get_args(choices):
                raise LlamaError(f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}")
        head = dict(extra or {})
        check_head(head)
    tensors = {ROOT + name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.items()}
    for name, parameter in lora_parameters(model).items():
        module, _, kind = name.rpartition(".")
        tensors[f"{ROOT}{hf_module(module, prefix)}.{kind}.weight"] = gather_whole(
            name, parameter.detach(), model.params
        )
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        **describe_sizes(layers, model.params, prefix),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in head}) or None,
        "bias": "none",
        "inference_mode": True,
    }
    with parallel.raise_together():
        if parallel.is_main_process():
            write_adapter(Path(directory), tensors, config)


def check_head(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        named = isinstance(name, str) and re.fullmatch(r"[\w.]+\.(weight|bias)", name)
        if not isinstance(tensor, Tensor) or not named:
            raise LlamaError(f"extra has {shorten(name)}: expected tensors by names such as score.weight")


def gather_whole(name: str, part: Tensor, args: ModelArgs) -> Tensor:
    """The whole tensor from every rank's part, on the CPU, with rotary pairs in Hugging Face's order."""
    dim, mp_size = split_dim(name), get_model_parallel_world_size()
    if dim is not None and mp_size > 1:
        parts = [torch.empty_like(part) for _ in range(mp_size)]
        dist.all_gather(parts, part.contiguous(), group=parallel.group())
        part = torch.cat(parts[:: ranks_per_part(name, args, mp_size)], dim)
    whole = part.cpu().contiguous()
    head_dim = rotary_head_dim(name, args)
    return whole if head_dim is None else permute_rotary(whole, head_dim, "hf")


def describe_sizes(layers: Mapping[str, LoraLinear], args: ModelArgs, prefix: Body) -> dict[str, Any]:
    """The keys of `adapter_config.json` that say which layers have an adapter, and of which sizes."""
    names = {module: hf_module(module, prefix) for module in layers}
    kinds = {name.rpartition(".")[2] for name in names.values()}
    of_kinds = [module for module in linear_modules(args) if hf_module(module).rpartition(".")[2] in kinds]
    r, alpha = Counter((layer.r, layer.alpha) for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": simplify_number(alpha),
        "lora_dropout": next(iter(layers.values())).dropout,
        "target_modules": sorted(kinds) if len(of_kinds) == len(layers) else list(names.values()),
        "rank_pattern": {names[module]: layer.r for module, layer in layers.items() if layer.r != r},
        "alpha_pattern": {
            names[m]: simplify_number(layer.alpha) for m, layer in layers.items() if layer.alpha != alpha
        },
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


def hf_module(module: str, prefix: str = "model") -> str:
    """Meta's name of a linear layer -> Hugging Face's. prefix: as in `save_adapter`."""
    return hf_name(f"{module}.weight", prefix).removesuffix(".weight")


def rotary_head_dim(name: str, args: ModelArgs) -> int | None:
    """head_dim if the tensor's rows are rotated by position, so that files have them in Hugging Face's order."""
    return args.head_size if is_rotary(name) and not name.endswith("lora_A") else None


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """What an adapter's directory holds."""

    dropout: float
    sizes: dict[str, tuple[int, float]] = field(default_factory=dict)  # (r, alpha) by Meta's names of the layers
    tensors: dict[str, Stored] = field(default_factory=dict)  # by names such as `layers.0.attention.wq.lora_A`
    base_tensors: dict[str, Stored] = field(default_factory=dict)  # tensors of the base model, by Meta's names
    extra: dict[str, Tensor] = field(default_factory=dict)  # tensors of a head, by transformers' names


def load_adapter(model: Transformer, directory: str | os.PathLike) -> dict[str, Tensor]:
    """Put the adapter in `directory` on a model, on any number of ranks.

    The model is then in evaluation mode, with all parameters but the adapter's frozen; `model.train()` lets the adapter
    be trained further. Returns the whole tensors of a head that the files hold (peft's `modules_to_save`), by
    transformers' names. Raises LlamaError, and leaves the model as it was, for files that are missing, broken or of
    another model, for variants of LoRA that change more than A and B do, and for a model that has an adapter.
    """
    with parallel.raise_together():
        adapter = read_adapter(Path(directory), model.params)
        check_plain(model, list(adapter.sizes))
        for name, stored in adapter.base_tensors.items():
            check_base_tensor(model, name, stored, Path(directory) / TENSORS)
    model.requires_grad_(False)
    for module, (r, alpha) in adapter.sizes.items():
        attach_adapter(model, module, r, alpha, adapter.dropout)
    for name, stored in adapter.tensors.items():
        copy_part(model, name, stored)
    model.eval()
    return adapter.extra


def check_base_tensor(model: Transformer, name: str, stored: Stored, path: Path) -> None:
    """Raise LlamaError unless a tensor of the base in an adapter's file is the model's own.

    peft writes the base's matrix along with an adapter of the output layer.
    """
    parameter = model.get_parameter(name)
    part = stored.part(model.params, get_model_parallel_rank(), get_model_parallel_world_size(), name)
    if not torch.equal(part.to(parameter), parameter):
        raise LlamaError(
            f"{path}: {stored.name} isn't the base's own, which an adapter leaves alone: let peft merge this one into "
            "its model (merge_and_unload, save_pretrained), and load that"
        )


def read_adapter(directory: Path, args: ModelArgs) -> Adapter:
    """The content of the directory. Raises LlamaError unless all of it fits a model of these sizes."""
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            older = "; adapter_model.bin is the older form: save it anew with peft"
            raise LlamaError(
                f"{directory / name} is missing: expected an adapter's directory, with {CONFIG} and {TENSORS}"
                + older * (directory / "adapter_model.bin").is_file()
            )
    config = read_adapter_config(directory / CONFIG)
    adapter = Adapter(read_dropout(config))
    problems = sort_tensors(adapter, read_file(directory / TENSORS), config, args)
    if problems:
        more = f"; and {pluralize(len(problems) - 5, 'more problem')}" if len(problems) > 5 else ""
        raise LlamaError(
            f"{directory / TENSORS} doesn't fit {CONFIG} and the model: {'; '.join(problems[:5])}{more}. Is it of this "
            "model?"
        )
    return adapter


def sort_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], config: Config, args: ModelArgs) -> list[str]:
    """Put the tensors of a file where they belong in the adapter. Returns what is wrong with them."""
    prefix = "transformer" if any(key.startswith(f"{ROOT}transformer.") for key in tensors) else "model"
    modules = {hf_module(module, prefix): module for module in linear_modules(args)}
    shapes, problems = tensor_shapes(args), []
    base = {hf_name(name): name for name in shapes}
    head_modules = config.value("modules_to_save") or []
    for key, tensor in tensors.items():
        name = key.removeprefix(ROOT) if key.startswith(ROOT) else ""
        owner, _, kind = name.removesuffix(".weight").rpartition(".")
        base_name = base.get(name.replace(".base_layer.", ".").replace(f"{prefix}.", "model.", 1))
        if base_name is not None:
            head_dim = rotary_head_dim(base_name, args)
            stored = adapter.base_tensors[base_name] = Stored(key, (tensor,), hf_head_dim=head_dim)
            problems += find_problems(stored, shapes[base_name])
        elif kind in ("lora_A", "lora_B") and owner in modules:
            module = modules[owner]
            r, _ = adapter.sizes[module] = read_size(config, owner)
            rows, columns = shapes[f"{module}.weight"]
            meta_name = f"{module}.{kind}"
            head_dim = rotary_head_dim(meta_name, args)
            stored = adapter.tensors[meta_name] = Stored(key, (tensor,), hf_head_dim=head_dim)
            problems += find_problems(stored, (r, columns) if kind == "lora_A" else (rows, r))
        elif "." in name and name.split(".")[0] in head_modules:
            adapter.extra[name] = tensor.clone()
        else:
            problems.append(f"surplus {shorten(key, 120)}")
    expected = {*select_targets(config, modules), *(hf_module(module, prefix) for module in adapter.sizes)}
    for owner in sorted(expected):
        absent = [kind for kind in ("lora_A", "lora_B") if f"{modules[owner]}.{kind}" not in adapter.tensors]
        problems += [f"missing {ROOT}{owner}.{kind}.weight" for kind in absent]
    return problems if adapter.sizes else [*problems, "no layer has an adapter"]


def find_problems(stored: Stored, expected: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor."""
    if stored.shape != expected:
        return [f"{stored.name} of shape {stored.shape}, expected {expected}"]
    if not stored.dtype.is_floating_point:
        return [f"{stored.name} of {stored.dtype}, expected numbers with a fraction"]
    return []
