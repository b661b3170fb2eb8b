"""Whether a model still computes what it computed before: else nothing that it left in the KV cache may be used.

Knows modules and their parameters; knows no cache.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..accelerate.fast_model import read_numbers
from ..accelerate.structure import is_original
from ..model import Transformer
from .forward_pass import is_dynamic


def read_version(model: Transformer) -> object:
    """Something that equals an earlier result only if the model was not edited, hooked or replaced in between."""
    if model.freqs_cis is None and not is_dynamic(model):  # they are computed at the first pass, which is no edit
        model.find_angles(torch.zeros(1, dtype=torch.long, device=model.device), 1, None)
    angles = model.freqs_cis
    turned = None if angles is None else (id(angles), angles.data_ptr(), angles._version)
    # Each new hook raises the number of hooks, wherever it is.
    outside = read_module(model), RemovableHandle.next_id, str(model.params), turned
    if model.fast is not None:
        return outside, model.fast.version
    return (outside, [read_module(module) for module in model.modules()]) if is_original(model) else object()


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
    if parameter.ndim < 2 or not parameter.numel():
        return read_numbers(parameter)
    flat = parameter.detach().reshape(-1, parameter.shape[-1])
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
