"""Whether a model still computes what it computed before: else nothing that it left in the KV cache may be used.

Knows modules and their parameters; knows no cache.
"""

import torch
from torch import Tensor, nn

from ..model import Transformer


def read_version(model: Transformer) -> object:
    """Something that equals an earlier result only if the model was not edited, hooked or replaced in between."""
    outside = read_module(model)
    if model.fast is not None:
        return outside, model.fast.version
    return outside, [read_module(module) for module in model.modules()]


def read_module(module: nn.Module) -> object:
    """What the module itself computes by, without its children."""
    own = vars(module)
    hooks = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])  # numbers that are never given again
    parameters = [read_parameter(p) for p in dict.values(own["_parameters"]) if isinstance(p, Tensor)]
    return id(module), type(module).forward, own.get("forward"), hooks, module.training, parameters


def read_parameter(parameter: Tensor) -> object:
    """Its numbers, in short: edits by way of `data` leave no other trace."""
    return (
        id(parameter),
        parameter.dtype,
        parameter.device,
        parameter.data_ptr(),
        parameter.detach().hash_tensor().view(torch.int64).item(),
    )
