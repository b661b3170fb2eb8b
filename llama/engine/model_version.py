"""Whether a model still computes what it computed before: else nothing that it left in the KV cache may be used.

Knows modules and their parameters; knows no cache.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model import Transformer


def read_version(model: Transformer) -> object:
    """Something that equals an earlier result only if the model was not edited, hooked or replaced in between."""
    outside = read_module(model), RemovableHandle.next_id  # which each new hook raises, wherever it is
    if model.fast is not None:
        return outside, model.fast.version
    return outside, [read_module(module) for module in model.modules()]


def read_module(module: nn.Module) -> object:
    """What the module itself computes by, without its children."""
    own = vars(module)
    hooks = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])  # numbers that are never given again
    parameters = [read_parameter(p) for p in dict.values(own["_parameters"]) if isinstance(p, Tensor)]
    plain = [(name, value) for name, value in own.items() if isinstance(value, bool | int | float | str)]
    return id(module), type(module).forward, own.get("forward"), hooks, plain, parameters


def read_parameter(parameter: Tensor) -> object:
    """Its numbers, in short: edits by way of `data` leave no other trace.

    A hash sees any number, and not where it is; sums with random factors see that, and not the smallest changes.
    """
    flat = parameter.detach().reshape(-1, parameter.shape[-1] if parameter.ndim else 1)
    factors = [draw_factors(size).to(flat) for size in flat.shape]
    place = (flat @ factors[1]) @ factors[0]
    hashed = parameter.detach().hash_tensor().view(torch.int64).item()
    return (
        id(parameter),
        parameter.dtype,
        parameter.device,
        parameter.data_ptr(),
        parameter._version,
        hashed,
        place.item(),
    )


@lru_cache(64)
def draw_factors(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(count))
