"""What a Transformer knows of its fast form, which `llama.accelerate` makes: the same results from packed weights.

Knows no layer and no kernel.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class FastForm(Protocol):
    """The fast form of a Transformer."""

    device: torch.device
    dtype: torch.dtype
    is_settled: bool  # whether `refresh` has nothing to do until this is False again

    @property
    def version(self) -> object: ...  # after `refresh`: as earlier only if nobody could have edited the model since
    def refresh(self, trains: bool = False) -> None: ...  # take over what was edited in the model since the last call
    def warm_up(self) -> None: ...  # prepare what is compiled or captured, if that was asked for
    def is_usable(self) -> bool: ...  # whether passes may run in the fast form now
    def forward(self, inputs: Any, hidden: list[Tensor] | None = None) -> Tensor: ...  # logits; hidden: as in `run`
    def hidden_states(self, inputs: Any) -> Tensor: ...  # as `Transformer.run`
    def logits(self, h: Tensor) -> Tensor: ...  # as `Transformer.logits`
