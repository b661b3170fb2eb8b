"""Where a decoding step's time goes, by operation, and how much of it Python takes.

    python -m benchmarks.profile --shape 1b --batch 1 --context 512       random weights, or --ckpt_dir DIR

Prints the operations that take the longest, with the time that each spends in itself and not in others that it calls.
What is left of the step is outside operations, which is Python. The truth is between two numbers: the profiler slows
operations down, so that a step as it is, less the operations' time, is too little; and it works between operations too,
so that a step with the profiler, less the same, is too much. Steps as they are come before and after the others. On a
GPU the operations' time is the GPU's, and what is left is when it waits.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from llama import parallel
from llama._util.console import say
from llama.accelerate.kernels import dispatch as kernels
from llama.bench.measure import Batch
from llama.bench.runner import DEFAULT_SHAPE, DEMO_SHAPE, SHAPES, BenchConfig
from llama.cli.program import errors_in_one_line
from llama.generation import Llama, Step

WARM_UP, STEPS, SHOWN = 4, 16, 20


@dataclass(frozen=True)
class Operation:
    """Calls, and seconds in itself, a step."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Seconds of a step as it is, and of one slowed by the profiler, with its operations, the longest first."""

    step: float
    slowed: float
    operations: list[Operation]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt_dir", help="directory or URL of a checkpoint (default: random weights of --shape)")
    add("--shape", help=f"{', '.join([*SHAPES, DEMO_SHAPE])}: sizes of random weights (default: {DEFAULT_SHAPE})")
    add("--batch", type=int, default=1, help="rows (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens of each prompt (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16, float16, float32, or auto: the files' (default: the best for the device)")
    add("--compile", action="store_true", help="as Llama.build(compile=True)")
    add("--quantization", help="as Llama.build(quantization=...)")
    return parser.parse_args()


def seconds_a_step(stream: Iterator[list[Step]]) -> float:
    """The mean of as many steps as the profiler will see, of which it tells no median."""
    start = time.perf_counter()
    for _ in range(STEPS):
        next(stream)
    return (time.perf_counter() - start) / STEPS


def operations(seen: profile, on_gpu: bool) -> list[Operation]:
    """What torch's dispatcher ran, the longest first. Python's functions that the profiler names too are left out."""
    found = []
    for event in seen.key_averages():
        if "::" in event.key and event.device_type == DeviceType.CPU:  # not a GPU's kernels: their time is the caller's
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
            found.append(Operation(event.key, event.count / STEPS, own / 1e6 / STEPS))
    return sorted(found, key=lambda operation: -operation.seconds)


@contextmanager
def named_kernels() -> Iterator[None]:
    """Show the calls of llama/native to the profiler, which sees only what torch's dispatcher runs."""
    prepared = kernels.prepared

    def named(name: str, *arguments: Tensor | int | float) -> Callable[[], int]:
        doing = prepared(name, *arguments)

        def shown() -> int:
            if kernels.NOTES.get() is not None:  # in a step that is recorded: it is a replay that shows them
                return doing()
            with record_function(f"kernels::{name}"):
                return doing()

        return shown

    kernels.prepared = named
    try:
        yield
    finally:
        kernels.prepared = prepared


def look(llama: Llama, batch: Batch, on_gpu: bool) -> Profile:
    stream = llama.stream(batch.prompts(llama.model.params.vocab_size), batch.gen, temperature=0)
    with named_kernels():
        for _ in range(1 + WARM_UP):
            next(stream)
        before = seconds_a_step(stream)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
            slowed = seconds_a_step(stream)
        after = seconds_a_step(stream)
    return Profile((before + after) / 2, slowed, operations(seen, on_gpu))


def show(found: Profile, layers: int) -> None:
    inside = sum(operation.seconds for operation in found.operations)
    first, rest = found.operations[:SHOWN], found.operations[SHOWN:]
    others = Operation(f"{len(rest)} others", sum(o.calls for o in rest), sum(o.seconds for o in rest))
    say(f"{'operation':48}{'calls':>8}{'ms':>10}{'share':>8}   a step, of all operations")
    for o in [*first, others]:
        say(f"{o.name:48}{o.calls:8.0f}{o.seconds * 1e3:10.3f}{o.seconds / inside:8.1%}")
    for name, step in (("as it is", found.step), ("with the profiler", found.slowed)):
        outside = step - inside
        say(
            f"a step {name}: {step * 1e3:.3f} ms, less {inside * 1e3:.3f} ms in operations: {outside * 1e6:.0f} us "
            f"outside, {outside / layers * 1e6:.1f} us for each of {layers} layers"
        )


def main() -> None:
    options = parse()
    place = parallel.initialize(None, options.device, None if options.dtype == "auto" else options.dtype)
    plan = BenchConfig.of(options, batches=[options.batch], prompts=[options.context], gen=1 + WARM_UP + 3 * STEPS)
    llama, (batch,) = plan.build(place), plan.kinds
    say(f"{plan.model}, {batch.name} tokens, {llama.model.dtype} on {place.device.type}")
    show(look(llama, batch, place.device.type == "cuda"), llama.model.params.n_layers)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
