"""Why numbers are not finite: a damaged weight by its name, or a dtype that overflows.

Knows a module's parameters; knows no layer, no sequence and no file.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..errors import LlamaError

Together = Callable[[str], AbstractContextManager[None]]


@torch.no_grad()
def not_finite_error(model: nn.Module, together: Together, what: str) -> LlamaError:
    """The error for numbers that aren't finite. Looks through all weights; every rank makes the same call.

    together: `Engine.together`, or `agreement.call_together` within a step.
    what: the numbers, and whether they are one or many, as in "row 0: the logits at position 5 are".
    """
    try:
        with together("look for damage"):
            for name, weight in model.named_parameters():
                if count := weight.numel() - int(weight.isfinite().sum()):
                    raise LlamaError(f"{name} has {count:,} of {weight.numel():,} values that are not")
    except LlamaError as damage:
        return LlamaError(
            f"{what} not finite in {dtype_of(model)}: {damage}; compare the file with its source, "
            "or build with dtype='float32' (--dtype float32)"
        )
    return LlamaError(
        f"{what} not finite in {dtype_of(model)}, though all weights are: "
        "build with dtype='float32' (--dtype float32), which overflows later"
    )


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
