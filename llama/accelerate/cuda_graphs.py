"""Decoding steps that are recorded once and then replayed, on a GPU as a CUDA graph: nothing waits for Python.

Knows steps, not what they compute. What a replay reads and writes lies where it lay when it was recorded.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..model import Attention, Transformer
from .call_capture import GraphRecorder, Record, Recording, record_calls
from .decode_steps import CompiledSteps, Step, Steps, make_caches, size_of

NO_TOKEN = -1  # the position of rows that only fill up a batch: kernels leave it out, and to index it is the last one


class GraphedStep:
    """In the place of a step: the same one, recorded when a size of batch is there for the first time, and replayed.

    What fills a batch up are rows at `NO_TOKEN`. A model with hooks, which a replay would not call, or under autocast,
    steps as it did.
    """

    def __init__(self, model: Transformer, step: Step, record: Record):
        self._model = model
        self._step = step
        self._record = record
        self._inputs: list[Tensor] = []  # tokens, positions and angles of max_batch_size rows
        self._recordings: dict[tuple[int, int | None], Recording] = {}
        self._recorded: Watch | None = None

    def __call__(self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None) -> Tensor:
        bsz, most = len(tokens), self._model.params.max_batch_size
        size = min(size_of(bsz), most)
        with torch.inference_mode(False), torch.no_grad():  # what is kept is usable in and out of it
            if self._recorded is None or not self._recorded.holds():
                make_caches(self._model)
                self._recordings.clear()
                self._recorded = Watch(self._model)
            if self._recorded.hooked() or torch.is_autocast_enabled(tokens.device.type):
                return self._step(tokens, positions, angles, end)
            if not self._inputs:
                self._inputs = [x.new_zeros(most, *x.shape[1:]) for x in (tokens.long(), positions, angles)]
            for own, given in zip(self._inputs, (tokens, positions, angles), strict=True):
                own[:bsz].copy_(given)
            self._inputs[1][bsz:size].fill_(NO_TOKEN)
            if (size, end) not in self._recordings:
                tokens, positions, angles = (x[:size] for x in self._inputs)  # which stay where they are
                self._recordings[size, end] = self._record(partial(self._step, tokens, positions, angles, end))
            else:
                self._recordings[size, end].replay()
        return self._recordings[size, end].output[:bsz].clone()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which records its own."""
        return {**self.__dict__, "_inputs": [], "_recordings": {}, "_recorded": None}


class Watch:
    """What a recording takes for granted: the model's modules and tensors, where these lie, and how many threads."""

    def __init__(self, model: Transformer):
        modules = list(model.modules())
        held = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._held = [(d, key, value) for d in cast(list[dict[str, Any]], held) for key, value in d.items()]
        # Kept detached: memory that a tensor gave away is no other's as long as it is compared with.
        tensors = [value for _, _, value in self._held if isinstance(value, Tensor)]
        self._tensors = [(tensor, tensor.detach(), tensor.data_ptr()) for tensor in tensors]
        self._hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._threads = torch.get_num_threads()

    def holds(self) -> bool:
        return (
            all(d.get(key) is value for d, key, value in self._held)
            and all(tensor.data_ptr() == place for tensor, _, place in self._tensors)
            and torch.get_num_threads() == self._threads
        )

    def hooked(self) -> bool:
        return any(self._hooks)


def record_steps(model: Transformer, steps: Steps, record: Record) -> None:
    """Have the steps recorded. Where attention is masked, the caches get a last position that is no row's own."""
    steps.step = GraphedStep(model, steps.step, record)
    if not steps.kernels:
        for module in model.modules():
            if isinstance(module, Attention):
                rows, heads, length, size = module.cache_shape
                module.cache_shape = (rows, heads, length + 1, size)


def make_steps(model: Transformer, kernels: bool, compile: bool) -> None:
    """Give the model the decoding steps of its device: recorded where they can be.

    kernels: whether the model has them. Without, the CPU waits for no Python that would be worth a recording.
    compile: have torch compile them, and all be ready before the first answer. On a CPU with kernels they are recorded
    instead, which is faster: compiled code would call the same kernels through torch's dispatcher.
    """
    device = model.norm.weight.device
    record: Record | None = None
    if device.type == "cuda":
        record = GraphRecorder(device)
    elif device.type == "cpu" and kernels:
        record = record_calls
    elif not compile:
        return
    steps = CompiledSteps(model, kernels) if compile and record is not record_calls else Steps(model, kernels)
    if record is not None:
        record_steps(model, steps, record)
    model.run = steps  # type: ignore[assignment, method-assign]
    if compile:
        steps.warm_up()
