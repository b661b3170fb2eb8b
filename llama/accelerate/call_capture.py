"""What a function computes, recorded to be computed again on the same memory without the Python that led to it.

On a GPU that is a CUDA graph, on the CPU a list of calls: of kernels, and of torch's operations.

Knows torch's operations and kernels.py; knows no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels.dispatch import NOTES, Note

RUNS_BEFORE = 2  # of what is recorded on a GPU: libraries and compilers do at first what no recording may have
NO_WORK = ("new_empty", "empty", "empty_like", "empty_strided")  # operations that only find memory


@dataclass(frozen=True)
class Recording:
    """To `replay` is to write `output` anew. kept: what it reads and writes, where nothing else keeps that."""

    replay: Callable[[], object]
    output: Tensor
    kept: object = None


Record = Callable[[Callable[[], Tensor]], Recording]  # which leaves in `output` what a replay would


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
        graph.replay()
        return Recording(graph.replay, output)


def record_calls(function: Callable[[], Tensor]) -> Recording:
    """Run a function, and note what it does. Where that can't be repeated by itself, all of the function is."""
    notes: list[Note] = []
    writer = Writer(notes)
    token = NOTES.set(notes)
    try:
        with writer:
            output = function()
    finally:
        NOTES.reset(token)
    if not writer.complete:
        return Recording(lambda: output.copy_(function()), output)
    doings = [doing for doing, _ in notes]

    def replay() -> None:
        for doing in doings:
            doing()

    return Recording(replay, output, notes)


class Writer(TorchDispatchMode):
    """Notes torch's operations. `complete`: whether each of them can be noted."""

    def __init__(self, notes: list[Note]):
        super().__init__()
        self.complete = True
        self._notes = notes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler to tell it to keep out of here, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace != "aten" or depends_on_numbers(func, args):
            self.complete = False
        elif func._schema.is_mutable:
            self._notes.append((partial(func, *args, **kwargs), ()))
        elif not func.is_view and func.overloadpacket.__name__ not in NO_WORK:
            self._notes.append((partial(again, output, func, args, kwargs), ()))
        return output


def depends_on_numbers(func: Any, args: Any) -> bool:
    """Whether what an operation gives becomes of no tensor's memory, or of another shape where numbers are others."""
    if func.overloadpacket is torch.ops.aten.index:  # by places that are listed, or by which are true
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def again(output: Tensor | tuple[Tensor, ...], func: Any, args: Any, kwargs: Any) -> None:
    """Write what the operation gives now over what it gave before."""
    found = func(*args, **kwargs)
    for old, new in zip(*((x,) if isinstance(x, Tensor) else x for x in (output, found)), strict=True):
        old.copy_(new)
