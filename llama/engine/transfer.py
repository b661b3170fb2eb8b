"""Small tensors between the CPU and a GPU, while both go on with what they do. Between other devices they are copied.

Knows no model.
"""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the CPU, on `device`: where that is a GPU, once it has done what it was told to before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the memory until it was read


class Arriving:
    """A tensor on its way to the CPU: to wait for it isn't to wait for what its device is told to do hereafter."""

    def __init__(self, tensor: Tensor):
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)  # in pinned memory, if so
        self._event = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """Floats that token ids and logprobs share a message in, without loss: the most precise that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
