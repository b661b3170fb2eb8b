"""Copies of small tensors between the CPU and a GPU, made while both go on with their work.

On other devices these are plain copies. Knows no model.
"""

import torch
from torch import Tensor


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's `tensor` on `device`. On a GPU the copy is queued behind earlier work, and nobody waits for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until it was read


class HostCopy:
    """A copy of a tensor on its way to the CPU. `wait` doesn't wait for work that its device is given later."""

    def __init__(self, tensor: Tensor):
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)  # from a GPU: in pinned memory
        self._event = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """The float dtype in which token ids and logprobs share a tensor without loss: the most precise of the device."""
    return torch.float32 if device.type == "mps" else torch.float64
