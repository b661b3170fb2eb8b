"""Shows where a decoding step's time goes: how much in each operation, and how much outside of them, in Python.

    python -m benchmarks.profile --shape 1b --batch 1 --context 512       random weights, or --ckpt_dir DIR

Prints the operations that take the longest, each with its own time, without that of operations that it calls. The rest
of the step is Python's. Two estimates enclose that rest. The profiler slows operations down, so that the time of a step
without the profiler, less the operations' time, is too little. It also works between operations, so that the time of a
step with the profiler, less the same, is too much. Steps without the profiler are timed before and after the others.
On a GPU the operations' time is the GPU's, and the rest is when it waits.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from llama import parallel
from llama._util.console import say
from llama.accelerate.kernels import cpu as kernels
from llama.bench.measure import Batch
from llama.bench.runner import DEFAULT_SHAPE, DEMO_SHAPE, SHAPES, BenchConfig
from llama.cli.program import errors_in_one_line
from llama.generation import Llama, Step

WARM_UP, STEPS, SHOWN = 4, 16, 20


@dataclass(frozen=True)
class Operation:
    """One operation in a decoding step, on average."""

    name: str
    calls: float
    seconds: float  # without the operations that it calls


@dataclass(frozen=True)
class Profile:
    """A decoding step, on average."""

    seconds: float  # without the profiler
    profiled_seconds: float  # with the profiler
    operations: list[Operation]  # the longest first


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt_dir", help="directory or URL of a checkpoint (default: random weights of --shape)")
    add("--adapter_dir", help="directory of an adapter of peft's")
    add("--shape", help=f"{', '.join([*SHAPES, DEMO_SHAPE])}: sizes of random weights (default: {DEFAULT_SHAPE})")
    add("--batch", type=int, default=1, help="prompts at a time (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens of each prompt (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16, float16, float32, or auto: as in the files (default: the best for the device)")
    add("--compile", action="store_true", help="as of Llama.build")
    add("--quantization", help="as of Llama.build: int8 or int4")
    return parser.parse_args()


def time_steps(stream: Iterator[list[Step]]) -> float:
    """The mean seconds of STEPS steps; the mean, since the profiler gives no median."""
    start = time.perf_counter()
    for _ in range(STEPS):
        next(stream)
    return (time.perf_counter() - start) / STEPS


def list_operations(profiler: profile, on_gpu: bool) -> list[Operation]:
    """The operations that torch's dispatcher ran, the longest first, without Python's functions."""
    operations = []
    for event in profiler.key_averages():
        if "::" in event.key and event.device_type == DeviceType.CPU:  # a GPU kernel's time is its caller's already
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            operations.append(Operation(event.key, event.count / STEPS, microseconds / 1e6 / STEPS))
    return sorted(operations, key=lambda operation: -operation.seconds)


@contextmanager
def show_kernels() -> Iterator[None]:
    """Show the calls of our own kernels to the profiler, which sees only what torch's dispatcher runs."""
    run_all = kernels.CallList.__call__
    apart: dict[int, list[kernels.CallList]] = {}  # by the id of a list, its calls as lists of one

    def run_shown(calls: kernels.CallList) -> None:
        if kernels.CAPTURED.get() is not None:  # in a step that is captured: its replay shows them
            run_all(calls)
        elif len(calls.calls) == 1:
            with record_function(f"kernels::{calls.calls[0].name}"):
                run_all(calls)
        else:
            if id(calls) not in apart:
                apart[id(calls)] = [kernels.CallList([call]) for call in calls.calls]
            for one in apart[id(calls)]:
                run_shown(one)

    kernels.CallList.__call__ = run_shown  # type: ignore[method-assign]
    try:
        yield
    finally:
        kernels.CallList.__call__ = run_all  # type: ignore[method-assign]


def profile_steps(llama: Llama, batch: Batch, on_gpu: bool) -> Profile:
    stream = llama.stream(batch.prompts(llama.model.params.vocab_size), batch.gen, temperature=0)
    with show_kernels():
        for _ in range(1 + WARM_UP):
            next(stream)
        before = time_steps(stream)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            profiled = time_steps(stream)
        after = time_steps(stream)
    return Profile((before + after) / 2, profiled, list_operations(profiler, on_gpu))


def print_profile(result: Profile, layers: int) -> None:
    inside = sum(operation.seconds for operation in result.operations)
    first, rest = result.operations[:SHOWN], result.operations[SHOWN:]
    others = Operation(f"{len(rest)} others", sum(o.calls for o in rest), sum(o.seconds for o in rest))
    say(f"{'operation':48}{'calls':>8}{'ms':>10}{'share':>8}   a step, of all operations")
    for o in [*first, others]:
        say(f"{o.name:48}{o.calls:8.0f}{o.seconds * 1e3:10.3f}{o.seconds / inside:8.1%}")
    for name, seconds in (("as it is", result.seconds), ("with the profiler", result.profiled_seconds)):
        outside = seconds - inside
        say(
            f"a step {name}: {seconds * 1e3:.3f} ms, less {inside * 1e3:.3f} ms in operations: {outside * 1e6:.0f} us "
            f"outside, {outside / layers * 1e6:.1f} us for each of {layers} layers"
        )


def main() -> None:
    options = parse_options()
    place = parallel.initialize(None, options.device, None if options.dtype == "auto" else options.dtype)
    config = BenchConfig.from_options(
        options, batches=[options.batch], prompts=[options.context], gen=1 + WARM_UP + 3 * STEPS
    )
    llama, (batch,) = config.build(place), config.all_batches
    say(f"{config.model}, {batch.name} tokens, {llama.model.norm.weight.dtype} on {place.device.type}")
    print_profile(profile_steps(llama, batch, place.device.type == "cuda"), llama.model.params.n_layers)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
