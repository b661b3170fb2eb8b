"""Low-rank adapters (LoRA, arXiv:2106.09685) on the linear layers of a built model, put there from outside: trained,
merged into the weights, or kept apart.

Knows layers and ranks; knows no files (see `adapter`) and no training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from .. import parallel
from .._util.validate import check_count, check_seed, is_number
from ..checkpoints.schema import Stored, is_linear, tensor_shapes
from ..errors import LlamaError, shorten
from ..model import ModelArgs, Transformer

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")


@dataclass(frozen=True)
class Lora:
    """What an adapter is: W x becomes W x + alpha / r * B A x, where A is (r, columns of W) and B (rows of W, r).

    targets: the layers that have one, by Meta's names, of TARGETS. dropout: the share of x that A doesn't see while the
    model is in training mode. Raises LlamaError for what can't be.
    """

    r: int = 8
    alpha: float = 16
    targets: Sequence[str] = ("wq", "wv")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("r", self.r)
        if not is_number(self.alpha) or self.alpha <= 0:
            raise LlamaError(f"alpha is {self.alpha!r}, expected a number above 0")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LlamaError(f"dropout is {self.dropout!r}, expected a number in [0, 1)")
        targets = self.targets
        if not isinstance(targets, list | tuple) or not targets or any(t not in TARGETS for t in targets):
            raise LlamaError(f"targets is {shorten(targets)}, expected a list of some of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(targets)))


class LoraLinear(nn.Module):
    """A layer of fairscale's with an adapter beside its matrix, over ranks as that layer is; both under its name.

    lora_A, (r, columns of W on this rank), and lora_B, (rows of W on this rank, r), are float32 whatever the model is,
    as small steps would be lost in less. Where the rows of W are divided, A is whole on every rank, and where its
    columns are, B is. On every rank both have their whole gradients after `backward`, but for B of wk and wv on more
    ranks than key/value heads: that is to be summed over `layout.shared_over` neighbouring ranks.
    """

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.by_rows = isinstance(layer, ColumnParallelLinear)
        self.gathers = isinstance(layer, ColumnParallelLinear) and layer.gather_output
        rows, columns = layer.weight.shape
        self.lora_A = nn.Parameter(layer.weight.new_zeros(r, columns, dtype=torch.float32))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(rows, r, dtype=torch.float32))
        layer.weight = layer.bias = None
        self.shell = (layer,)  # in a tuple: no module of this one, and without parameters

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns of W on this rank) -> (..., rows of W, on this rank or in all)."""
        h = F.linear(self.dropped(x).float(), self.lora_A)  # (..., r)
        if self.by_rows:
            h = copy_to_model_parallel_region(h)
            y = F.linear(copy_to_model_parallel_region(x), self.weight, self.bias)
        else:
            h = reduce_from_model_parallel_region(h)
            y = reduce_from_model_parallel_region(F.linear(x, self.weight))
            y = y if self.bias is None else y + self.bias
        y = (y + self.alpha / self.r * F.linear(h, self.lora_B)).type_as(y)
        return gather_from_model_parallel_region(y) if self.gathers else y

    def dropped(self, x: Tensor) -> Tensor:
        parts = 1 if self.by_rows else get_model_parallel_world_size()
        return dropped(x, self.dropout, parts) if self.training else x

    def matrix(self) -> Tensor:
        """W + alpha / r * B A, of this rank: differentiable, though not of A where W's columns are divided."""
        adapter = self.lora_B @ copy_to_model_parallel_region(self.lora_A)
        return (self.weight + self.alpha / self.r * adapter).type_as(self.weight)

    def merged(self) -> ColumnParallelLinear | RowParallelLinear:
        """The layer that this one replaced, its weight W + alpha / r * B A."""
        (layer,) = self.shell
        layer.bias = self.bias
        layer.weight = nn.Parameter(self.matrix().detach())
        return layer


def dropped(x: Tensor, share: float, parts: int = 1) -> Tensor:
    """x (..., D) with a share of it zero, the same on any number of ranks: torch's generator on the group's first rank
    says which, for all D * parts numbers where ranks have so many parts of them."""
    if share == 0:
        return x
    seed = parallel.broadcast(torch.randint(1 << 62, (1,)))
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.rand(*x.shape[:-1], parts, x.shape[-1], device=x.device, generator=generator) >= share
    return x * kept[..., get_model_parallel_rank() % parts, :] / (1 - share)


def add_lora(model: Transformer, lora: Lora, seed: int) -> None:
    """Put adapters beside the targeted layers of all blocks, and freeze all else.

    A is drawn from the seed as nn.Linear draws its weights, the same whole matrices on any number of ranks; B is zero,
    so that nothing changes yet. Raises LlamaError for a model that has an adapter or isn't made of fairscale's layers.
    """
    check_seed(seed)
    modules = [name for name in linear_modules(model.params) if name.rpartition(".")[2] in lora.targets]
    if model.params.tied_embeddings and "output" in lora.targets:
        raise LlamaError("targets has output, which in this model is the embedding: leave it out")
    check_plain(model, modules)
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    shapes = tensor_shapes(model.params)
    model.requires_grad_(False)
    for name in modules:
        columns = shapes[f"{name}.weight"][1]
        bound = columns**-0.5
        drawn = torch.empty(lora.r, columns).uniform_(-bound, bound, generator=generator)
        attach(model, name, lora.r, lora.alpha, lora.dropout)
        fill(model, f"{name}.lora_A", Stored(name, (drawn,)))


def merge_lora(model: Transformer) -> None:
    """W += alpha / r * B A in every layer with an adapter. The plain layers stand there again; all may be trained.

    Raises LlamaError where there is no adapter.
    """
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.merged())
    model.requires_grad_(True)


def lora_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """What of the model is trained, on this rank, by name: `layers.0.attention.wq.lora_A`, its `lora_B`, and so on.

    Raises LlamaError where there is no adapter.
    """
    layers = lora_layers(model).items()
    return {f"{name}.{p}": layer.get_parameter(p) for name, layer in layers for p in ("lora_A", "lora_B")}


def lora_layers(model: Transformer) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name. Raises LlamaError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not found:
        raise LlamaError("the model has no adapter: call add_lora or load_adapter first")
    return found


def linear_modules(args: ModelArgs) -> list[str]:
    """The names of all linear layers; a tied output layer isn't one."""
    return [name.removesuffix(".weight") for name in tensor_shapes(args) if is_linear(name)]


def check_plain(model: Transformer, modules: Sequence[str]) -> None:
    """Whether adapters can be put on these modules."""
    there = dict(model.named_modules())
    if any(isinstance(module, LoraLinear) for module in there.values()):
        raise LlamaError("the model has an adapter: call merge_lora, or build the model anew, before the next one")
    for name in modules:
        if not isinstance(there.get(name), ColumnParallelLinear | RowParallelLinear):
            found = type(there[name]).__name__ if name in there else "nothing"
            raise LlamaError(
                f"{name}: found {found}, expected a layer of fairscale's: put adapters on a model of "
                "llama.checkpoint.load_model, before it takes another form"
            )


def attach(model: Transformer, name: str, r: int, alpha: float, dropout: float) -> None:
    """Put an adapter of zeros on the layer of this name."""
    replace_module(model, name, LoraLinear(model.get_submodule(name), r, alpha, dropout).train(model.training))


def fill(model: Transformer, name: str, whole: Stored) -> None:
    """Make the parameter of this name this rank's part of a whole tensor."""
    part = whole.part(model.params, get_model_parallel_rank(), get_model_parallel_world_size(), name)
    model.get_parameter(name).data.copy_(part)


def replace_module(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
