"""Captures of what a function computes, to be replayed on the same memory without the Python that led to it.

On a GPU a capture is a CUDA graph. On the CPU it is a list of calls: kernels that follow each other are one call of the
library, and torch's operations between them are calls of Python.

Knows torch's operations and the kernels' calls; knows no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels.cpu import CAPTURED, Call, CallList

RUNS_BEFORE = 2  # of a function on a GPU: libraries and compilers do at first what no graph may have
NO_WORK = ("new_empty", "empty", "empty_like", "empty_strided")  # operations that only take memory


@dataclass(frozen=True)
class Capture:
    """A captured function. To `replay` is to write `output` anew."""

    replay: Callable[[], object]
    output: Tensor


Operation = Callable[[], object]  # one of torch's, on the tensors of the capture
CaptureFunction = Callable[[Callable[[], Tensor]], Capture]  # leaves in `output` what a replay would


class GraphCapture:
    """Captures functions as CUDA graphs. All graphs share one pool of memory: one is replayed at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Capture:
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
        return Capture(graph.replay, output)


def capture_calls(function: Callable[[], Tensor]) -> Capture:
    """Run a function and capture its calls. If one can't be repeated alone, a replay runs the whole function."""
    calls: list[Call | Operation] = []
    operations = OperationCapture(calls)
    token = CAPTURED.set(calls)
    try:
        with operations:
            output = function()
    finally:
        CAPTURED.reset(token)
    if not operations.complete:
        return Capture(lambda: output.copy_(function()), output)
    steps = join_calls(calls)

    def replay() -> None:
        for step in steps:
            step()

    return Capture(steps[0] if len(steps) == 1 else replay, output)


def join_calls(calls: Sequence[Call | Operation]) -> list[Operation]:
    """The calls in their order, with kernels that follow each other as one."""
    steps: list[Operation] = []
    kernels: list[Call] = []
    for call in [*calls, None]:
        if isinstance(call, Call):
            kernels.append(call)
            continue
        steps += [CallList(kernels)] if kernels else []
        kernels = []
        steps += [] if call is None else [call]
    return steps


class OperationCapture(TorchDispatchMode):
    """Captures torch's operations as calls."""

    def __init__(self, calls: list[Call | Operation]):
        super().__init__()
        self.complete = True  # whether each operation could be captured
        self._calls = calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler to keep it out of here, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace != "aten" or depends_on_numbers(func, args):
            self.complete = False
        elif func._schema.is_mutable:
            self._calls.append(partial(func, *args, **kwargs))
        elif not func.is_view and func.overloadpacket.__name__ not in NO_WORK:
            self._calls.append(partial(repeat, output, func, args, kwargs))
        return output


def depends_on_numbers(func: Any, args: Any) -> bool:
    """Whether an operation's result is no tensor, or has a shape that depends on the numbers in its arguments."""
    if func.overloadpacket is torch.ops.aten.index:  # by a list of places, or by which are true
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def repeat(output: Tensor | tuple[Tensor, ...], func: Any, args: Any, kwargs: Any) -> None:
    """Write the operation's result of now over its earlier one."""
    results = func(*args, **kwargs)
    for old, new in zip(*((x,) if isinstance(x, Tensor) else x for x in (output, results)), strict=True):
        old.copy_(new)
