"""Low-rank adapters (LoRA, arXiv:2106.09685) on the linear layers of a built model: trained, merged or kept apart.

The model doesn't know of them: they are put on it from outside. Knows layers and ranks; knows no files (see `peft`) and
no training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

KINDS = ("lora_A", "lora_B", "lora_magnitude", "lora_bias")  # an adapter's parameters; the last two not always
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")


@dataclass(frozen=True)
class Lora:
    """The settings of an adapter: W x becomes W x + alpha / r * B A x, with A (r, columns of W) and B (rows of W, r).

    Raises LlamaError for values out of their ranges.
    """

    r: int = 8  # the rank of B A
    alpha: float = 16  # the adapter is scaled by alpha / r
    targets: Sequence[str] = ("wq", "wv")  # the layers that get an adapter, some of TARGETS
    dropout: float = 0.0  # the share of x that A doesn't see while the model is in training mode

    def __post_init__(self) -> None:
        check_count("r", self.r)
        if not is_number(self.alpha) or self.alpha <= 0:
            raise LlamaError(f"alpha is {shorten(self.alpha)}, expected a number above 0")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LlamaError(f"dropout is {shorten(self.dropout)}, expected a number in [0, 1)")
        targets = self.targets
        if not isinstance(targets, list | tuple) or not targets or any(t not in TARGETS for t in targets):
            raise LlamaError(f"targets is {shorten(targets)}, expected a list of some of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(targets)))


class LoraLinear(nn.Module):
    """A linear layer of fairscale with an adapter, divided over ranks as the layer is. It takes the layer's place.

    If ranks divide the rows of W, A is whole on every rank; if they divide its columns, B is. After `backward`, every
    rank has the whole gradients of both, with one exception: B of wk and wv on more ranks than key/value heads, whose
    gradients must be summed over `schema.ranks_per_part` neighbouring ranks. The magnitude and the bias go with B.
    """

    weight: nn.Parameter  # W on this rank
    bias: nn.Parameter | None
    lora_A: nn.Parameter  # (r, columns of W on this rank); float32, since small steps would be lost in less
    lora_B: nn.Parameter  # (rows of W on this rank, r); float32
    lora_magnitude: nn.Parameter | None  # (rows of W on this rank): the lengths of the rows (DoRA, arXiv:2402.09353)
    lora_bias: nn.Parameter | None  # (rows of W on this rank): B A x becomes B A x + this
    divides_rows: bool  # whether ranks divide the rows of W, else its columns
    gathers: bool  # whether the output is gathered from all ranks
    origin: Any  # the `reading.Adapter` that it was loaded from, whose other tensors are written with it; None: none

    def __init__(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        r: int,
        alpha: float,
        dropout: float,
        kinds: Sequence[str] = (),
    ):
        """kinds: which of lora_magnitude and lora_bias there are; they are zero."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.divides_rows = isinstance(layer, ColumnParallelLinear)
        self.gathers = isinstance(layer, ColumnParallelLinear) and layer.gather_output
        self.origin = None
        rows, columns = layer.weight.shape
        self.lora_A = nn.Parameter(layer.weight.new_zeros(r, columns, dtype=torch.float32))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(rows, r, dtype=torch.float32))
        for kind in ("lora_magnitude", "lora_bias"):
            zeros = layer.weight.new_zeros(rows, dtype=torch.float32)
            self.register_parameter(kind, nn.Parameter(zeros) if kind in kinds else None)
        layer.weight = layer.bias = None
        self.replaced = (layer,)  # without its parameters; in a tuple, so that it isn't a submodule of this one

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns of W on this rank) -> (..., rows of W, on this rank or in all)."""
        y, seen = self.multiply(x), self.apply_dropout(x)
        h = F.linear(seen.float(), self.lora_A)  # (..., r)
        h = copy_to_model_parallel_region(h) if self.divides_rows else reduce_from_model_parallel_region(h)
        delta = self.alpha / self.r * F.linear(h, self.lora_B, self.lora_bias)
        if self.lora_magnitude is not None:
            kept, ratio = y if seen is x else self.multiply(seen), self.compute_ratio(self.lora_magnitude)
            kept = kept if self.bias is None else kept - self.bias
            delta = (ratio - 1) * kept + ratio * delta
        y = (y + delta).type_as(y)
        return gather_from_model_parallel_region(y) if self.gathers else y

    def multiply(self, x: Tensor) -> Tensor:
        """W x and the bias, as the layer without an adapter."""
        if self.divides_rows:
            return F.linear(copy_to_model_parallel_region(x), self.weight, self.bias)
        y = reduce_from_model_parallel_region(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias

    def apply_dropout(self, x: Tensor) -> Tensor:
        parts = 1 if self.divides_rows else get_model_parallel_world_size()
        return apply_dropout(x, self.dropout, parts) if self.training else x

    def add_adapter(self) -> Tensor:
        """W + alpha / r * B A on this rank. Differentiable, except with respect to A if ranks divide W's columns."""
        adapter = self.lora_B @ copy_to_model_parallel_region(self.lora_A)
        return self.weight + self.alpha / self.r * adapter

    def compute_ratio(self, magnitude: Tensor) -> Tensor:
        """What scales each row to the length in `magnitude`. The lengths before count as constants (DoRA, 4.3)."""
        with torch.no_grad():
            squares = self.add_adapter().float().pow(2).sum(1)
            if not self.divides_rows:
                squares = reduce_from_model_parallel_region(squares)
        return magnitude / squares.sqrt()

    def compute_weight(self) -> Tensor:
        """The matrix that stands for W and the adapter on this rank; see `add_adapter`."""
        whole = self.add_adapter()
        if self.lora_magnitude is not None:
            whole = whole * self.compute_ratio(self.lora_magnitude)[:, None]
        return whole.type_as(self.weight)

    def compute_bias(self) -> Tensor | None:
        """The bias that stands for the layer's and the adapter's. None: neither has one."""
        if self.lora_bias is None:
            return self.bias
        bias = self.alpha / self.r * self.lora_bias
        return (bias if self.bias is None else self.bias + bias).type_as(self.weight)

    def merge(self) -> ColumnParallelLinear | RowParallelLinear:
        """The layer that this one replaced, with the adapter in its weight and bias.

        Raises LlamaError for an adapter with a bias on a layer without one.
        """
        (layer,) = self.replaced
        bias = self.compute_bias()
        layer.bias = self.bias if bias is self.bias or bias is None else nn.Parameter(bias.detach())
        layer.weight = nn.Parameter(self.compute_weight().detach())
        return layer


def apply_dropout(x: Tensor, share: float, parts: int = 1) -> Tensor:
    """x (..., D) with a share of it zero and the rest scaled up, the same on any number of ranks.

    parts: how many ranks divide the whole x, of D * parts columns; the mask is drawn for all of them. Its seed comes
    from torch's generator on the group's first rank.
    """
    if share == 0:
        return x
    seed = parallel.broadcast(torch.randint(1 << 62, (1,)))
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.rand(*x.shape[:-1], parts, x.shape[-1], device=x.device, generator=generator) >= share
    return x * kept[..., get_model_parallel_rank() % parts, :] / (1 - share)


def add_lora(model: Transformer, lora: Lora, seed: int) -> None:
    """Put adapters on the targeted layers, and freeze all other parameters.

    A is drawn from the seed as nn.Linear draws its weights: whole matrices, the same on any number of ranks. B is zero,
    so that the model's outputs don't change yet. Raises LlamaError for a model that has an adapter, or whose layers
    aren't fairscale's.
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
        whole = torch.empty(lora.r, columns).uniform_(-bound, bound, generator=generator)
        attach_adapter(model, name, lora.r, lora.alpha, lora.dropout)
        copy_part(model, f"{name}.lora_A", Stored(name, (whole,)))


def merge_lora(model: Transformer) -> None:
    """Add alpha / r * B A to W in every layer with an adapter, and put the plain layers back. Unfreezes all parameters.

    Raises LlamaError if there is no adapter, and for one with biases (`lora_bias`) on layers that have none.
    """
    layers = lora_layers(model)
    if alone := [name for name, layer in layers.items() if layer.lora_bias is not None and layer.bias is None]:
        raise LlamaError(
            f"{alone[0]} has no bias that the adapter's (lora_bias) could be added to: build the model with "
            "adapter_dir, which makes one"
        )
    for name, layer in layers.items():
        replace_module(model, name, layer.merge())
    model.requires_grad_(True)


def lora_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The adapter's parameters on this rank by name: `layers.0.attention.wq.lora_A`, its `lora_B`, and so on.

    Raises LlamaError if there is no adapter.
    """
    layers = lora_layers(model).items()
    return {f"{name}.{k}": p for name, layer in layers for k in KINDS if (p := getattr(layer, k)) is not None}


def lora_layers(model: Transformer) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name. Raises LlamaError if there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise LlamaError("the model has no adapter: call add_lora or load_adapter first")
    return layers


def has_lora(model: Transformer) -> bool:
    """Whether a layer has an adapter."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def linear_modules(args: ModelArgs) -> list[str]:
    """The names of all linear layers. A tied output layer isn't among them."""
    return [name.removesuffix(".weight") for name in tensor_shapes(args) if is_linear(name)]


def check_plain(model: Transformer, modules: Sequence[str]) -> None:
    """Raise LlamaError unless adapters can be put on these modules."""
    named = dict(model.named_modules())
    if has_lora(model):
        raise LlamaError("the model has an adapter: call merge_lora, or build the model anew, before the next one")
    for name in modules:
        if not isinstance(named.get(name), ColumnParallelLinear | RowParallelLinear):
            kind = type(named[name]).__name__ if name in named else "nothing"
            raise LlamaError(
                f"{name}: found {kind}, expected a layer of fairscale's: put adapters on a model of "
                "llama.checkpoints.loader.load_model, before its layers are replaced"
            )


def attach_adapter(
    model: Transformer, name: str, r: int, alpha: float, dropout: float, kinds: Sequence[str] = ()
) -> LoraLinear:
    """Put an adapter on the layer of this name. All of it is zero; kinds: as in LoraLinear."""
    layer = LoraLinear(model.get_submodule(name), r, alpha, dropout, kinds).train(model.training)
    replace_module(model, name, layer)
    return layer


def copy_part(model: Transformer, name: str, whole: Stored) -> None:
    """Copy this rank's part of a whole tensor into the parameter of this name."""
    part = whole.part(model.params, get_model_parallel_rank(), get_model_parallel_world_size(), name)
    model.get_parameter(name).data.copy_(part)


def replace_module(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
