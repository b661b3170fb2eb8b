"""Decoding steps that are recorded once, as a CUDA graph, and then replayed: the GPU waits for no Python.

Knows steps, not what they compute. What a replay reads and writes lies where it lay when it was recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .model import Attention, Transformer
from .steps import CompiledSteps, Step, Steps, make_caches

NO_TOKEN = -1  # the position of rows that only fill up a batch: kernels leave it out, and to index it is the last one
RUNS_BEFORE = 2  # of what is recorded: libraries and compilers do at first what no recording may have


@dataclass(frozen=True)
class Recording:
    """To `replay` is to write `output` anew."""

    replay: Callable[[], None]
    output: Tensor


Record = Callable[[Callable[[], Tensor]], Recording]


class GraphRecorder:
    """Records what a function launches on a GPU. All recordings share one pool of memory: one is replayed at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Recording:
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(RUNS_BEFORE):
                    function()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the one that watches NCCL, may go on asking the GPU what they like.
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                output = function()
        return Recording(graph.replay, output)


class GraphedStep:
    """In the place of a step: the same one, recorded when a size of batch is there for the first time, and replayed.

    Sizes are powers of two, and max_batch_size. What fills a batch up are rows at `NO_TOKEN`.
    """

    def __init__(self, model: Transformer, step: Step, record: Record):
        self._model = model
        self._step = step
        self._record = record
        self._inputs: list[Tensor] = []  # tokens, positions and angles of max_batch_size rows
        self._recordings: dict[tuple[int, int | None], Recording] = {}
        self._memory: list[Tensor] = []

    def __call__(self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None) -> Tensor:
        bsz, most = len(tokens), self._model.params.max_batch_size
        size = min(1 << (bsz - 1).bit_length(), most)
        with torch.inference_mode(False), torch.no_grad():  # what is kept is usable in and out of it
            self._forget_what_has_moved()
            if not self._inputs:
                self._inputs = [x.new_zeros(most, *x.shape[1:]) for x in (tokens.long(), positions, angles)]
            for own, given in zip(self._inputs, (tokens, positions, angles), strict=True):
                own[:bsz].copy_(given)
            self._inputs[1][bsz:size].fill_(NO_TOKEN)
            if (size, end) not in self._recordings:
                tokens, positions, angles = (x[:size] for x in self._inputs)  # which stay where they are
                self._recordings[size, end] = self._record(partial(self._step, tokens, positions, angles, end))
            recording = self._recordings[size, end]
        recording.replay()
        return recording.output[:bsz].clone()

    def _forget_what_has_moved(self) -> None:
        """Weights and caches may be others by now. Whatever changes a whole model changes those that are looked at."""
        model = self._model
        caches = cast(Attention, model.layers[0].attention).caches(model.norm.weight)
        now = [*model.norm.parameters(), *model.output.parameters(), *caches]
        if [x.data_ptr() for x in now] != [x.data_ptr() for x in self._memory]:
            make_caches(model)
            self._recordings.clear()
            self._memory = [x.detach() for x in now]  # kept, so that nothing else comes to lie there

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which records its own."""
        return {**self.__dict__, "_inputs": [], "_recordings": {}, "_memory": []}


def record_steps(model: Transformer, steps: Steps, record: Record) -> None:
    """Have the steps recorded. Where attention is masked, the caches get a last position that is no row's own."""
    steps.step = GraphedStep(model, steps.step, record)
    if not steps.kernels:
        for module in model.modules():
            if isinstance(module, Attention):
                rows, heads, length, size = module.cache_shape
                module.cache_shape = (rows, heads, length + 1, size)


def make_steps(model: Transformer, kernels: bool, compile: bool) -> None:
    """Give the model the decoding steps of its device: on a GPU recorded; and compiled, now, where that's asked for."""
    device = model.norm.weight.device
    if not compile and device.type != "cuda":
        return
    steps = CompiledSteps(model, kernels) if compile else Steps(model, kernels)
    if device.type == "cuda":
        record_steps(model, steps, GraphRecorder(device))
    model.run = steps  # type: ignore[method-assign]
    if isinstance(steps, CompiledSteps):
        steps.warm_up()
