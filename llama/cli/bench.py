"""`python -m llama bench`: its options, and the report that it prints or draws."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from .._util.console import say
from .._util.packages import install_command
from .._util.ranks import is_main_process
from ..bench.load import Range, ServeLoad
from ..bench.measure import RAGGED
from ..bench.plots import Chart
from ..bench.runner import DEFAULT_SHAPE, DEMO_SHAPE, SHAPES, BenchConfig, parse_counts, run_benchmark
from ..bench.serve_runner import SERVE_PEERS, ServeConfig, run_serve_benchmark
from ..bench.stress import StressCounts, run_stress
from ..bench.subjects import PEERS
from ..errors import LlamaError, shorten
from ..generation import PREFILL_CHUNK, Llama
from .model_options import ADAPTER_DIR, DEVICE, DTYPE, INTEGER, NUMBER, add_speed_options
from .serve import ADDRESS, NEEDED, listen

# Options of one benchmark: what is taken where they aren't given. The parser's own default is None, which tells.
BATCH_DEFAULTS: dict[str, Any] = {"batch": "1", "prompt": "512", "gen": 64, "ragged": False, "plot": None, "with": []}
LOAD = ServeLoad()
SERVE_DEFAULTS: dict[str, Any] = {
    "requests": LOAD.requests,
    "clients": LOAD.clients,
    "rate": LOAD.rate,
    "prompt_range": str(LOAD.prompt_range),
    "gen_range": str(LOAD.gen_range),
    "slots": ServeConfig.slots,
    "prefill_chunk": PREFILL_CHUNK,
    "load_seed": LOAD.seed,
    "http": False,
}
MODEL_OPTIONS = ("ckpt_dir", "adapter_dir", "shape", "dtype", "compile", "quantization", "compare")
COUNTERPARTS = {"batch": "slots", "prompt": "prompt_range", "gen": "gen_range"}  # of --serve


def add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("model").add_argument
    shapes = ", ".join([*SHAPES, DEMO_SHAPE])
    add(
        "--ckpt_dir",
        metavar="DIR",
        help="directory of a checkpoint, or its gs:// or az:// URL (default: random weights of --shape)",
    )
    add("--adapter_dir", metavar="DIR", help=ADAPTER_DIR)
    add("--shape", help=f"sizes of the random weights: {shapes} (default: {DEFAULT_SHAPE})")
    add("--device", help=DEVICE)
    add("--dtype", help=DTYPE)
    add = command.add_argument_group("what is measured").add_argument
    add("--batch", metavar="N", help="prompts at a time, or several such numbers: 1,8 (default: 1)")
    add("--prompt", metavar="N", help="tokens of a prompt, or several: 128,512,2048 (default: 512)")
    add("--gen", **INTEGER, help="tokens to generate for each prompt (default: 64)")
    ragged = f"also prompts of {RAGGED.name} tokens, with {RAGGED.gen} new ones each"
    add("--ragged", action="store_true", default=None, help=ragged)
    add("--repeats", **INTEGER, default=3, help="runs of each batch or load, after a warm-up (default: 3)")
    peers = f"run these beside it: {', '.join(PEERS)}; with --serve: {', '.join(SERVE_PEERS)}"
    add("--compare", default="", metavar="PEERS", help=peers)
    add_serve_options(command)
    add = command.add_argument_group("stress").add_argument
    what = "ask a server of the demo model at random, much at once and much in a row, and tell what went wrong"
    add("--stress", action="store_true", help=what)
    add_speed_options(command)
    add = command.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one JSON object, for programs and for --with")
    add("--plot", metavar="FILE", help="draw speed by batch size, prompt length and ranks: .png, .svg or .pdf")
    add("--with", nargs="+", metavar="FILE", help="also draw these outputs of --json")
    command.set_defaults(run=run)


def add_serve_options(command: argparse.ArgumentParser) -> None:
    """The options of the serving benchmark."""
    why = "Requests of random lengths come and go; instead of --batch, --prompt and --gen."
    add = command.add_argument_group("serving", why).add_argument
    add("--serve", action="store_true", help="measure tokens a second of all requests, and how long each waits")
    add("--requests", **INTEGER, help=f"how many (default: {LOAD.requests})")
    add("--clients", **INTEGER, help=f"that send a request as soon as they have an answer (default: {LOAD.clients})")
    add("--rate", **NUMBER, help="requests a second that arrive at random, whoever still waits, in place of clients")
    add("--prompt_range", metavar="N-N", help=f"tokens of a prompt (default: {LOAD.prompt_range})")
    add("--gen_range", metavar="N-N", help=f"tokens of an answer (default: {LOAD.gen_range})")
    add("--slots", **INTEGER, help=f"requests that go on at a time (default: {ServeConfig.slots})")
    add("--prefill_chunk", **INTEGER, help=f"tokens of prompts in one pass (default: {PREFILL_CHUNK})")
    add("--http", action="store_true", default=None, help="also ask this package's own server, over HTTP")
    add("--load_seed", **INTEGER, help=f"the same seed gives the same load (default: {LOAD.seed})")


def run(options: argparse.Namespace) -> None:
    if options.stress:
        return run_stress_test(options)
    settle_options(options)
    if options.serve:
        serve_report = run_serve_benchmark(read_serve_config(options), open_server)
        say(serve_report.as_json() if options.json else serve_report.as_text())
        return
    config = BenchConfig.from_options(
        options,
        batches=parse_counts("--batch", options.batch),
        prompts=parse_counts("--prompt", options.prompt),
        gen=options.gen,
        ragged=options.ragged,
        repeats=options.repeats,
        peers=parse_peers(options.compare),
    )
    earlier = getattr(options, "with")
    if earlier and options.plot is None:
        raise LlamaError("--with was given without --plot: name the picture that it shall be drawn in")
    chart = Chart(options.plot, earlier) if options.plot is not None else None
    report = run_benchmark(config)
    say(report.as_json() if options.json else report.as_text())
    if chart is not None and is_main_process():
        chart.draw(report)


def run_stress_test(options: argparse.Namespace) -> None:
    """Print what came of the stress test. Raises LlamaError for faults, and for options that it doesn't have."""
    for name in ("serve", *BATCH_DEFAULTS, *SERVE_DEFAULTS, *MODEL_OPTIONS):
        if getattr(options, name):
            raise LlamaError(f"--{name} was given with --stress, which decides that itself: leave one of them out")
    report = run_stress(options.device, StressCounts())
    say(report.as_json() if options.json else report.as_text())
    if report.faults:
        raise LlamaError(f"{len(report.faults)} faults, first: {report.faults[0]}")


def settle_options(options: argparse.Namespace) -> None:
    """Fill in defaults. Raises LlamaError for options of the benchmark that isn't run."""
    for name in BATCH_DEFAULTS if options.serve else SERVE_DEFAULTS:
        if getattr(options, name) is None:
            continue
        if not options.serve:
            raise LlamaError(f"--{name} was given without --serve: add --serve, or leave it out")
        instead = f"take --{COUNTERPARTS[name]} in its place" if name in COUNTERPARTS else "leave it out"
        raise LlamaError(f"--{name} is an option of the benchmark without --serve: {instead}")
    if options.clients is not None and options.rate is not None:
        raise LlamaError("both --clients and --rate were given: requests come from clients or at a rate, give one")
    for name, default in (SERVE_DEFAULTS if options.serve else BATCH_DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def read_serve_config(options: argparse.Namespace) -> ServeConfig:
    load = ServeLoad(
        requests=options.requests,
        clients=options.clients,
        rate=options.rate,
        prompt_range=parse_range("--prompt_range", options.prompt_range),
        gen_range=parse_range("--gen_range", options.gen_range),
        seed=options.load_seed,
    )
    return ServeConfig.from_options(
        options,
        load=load,
        slots=options.slots,
        prefill_chunk=options.prefill_chunk,
        repeats=options.repeats,
        peers=parse_peers(options.compare),
        http=options.http,
    )


@contextlib.contextmanager
def open_server(llama: Llama, most: int) -> Iterator[tuple[str, int]]:
    """In this context a model is served at an address, to so many clients at once. Raises LlamaError if it can't be."""
    try:
        from ..server.service import ServerOptions, Service
        from ..server.threaded import serve_in_thread
    except ModuleNotFoundError as e:
        raise LlamaError(f"--http needs {e.name}, which is not installed: run {install_command(*NEEDED)}") from e
    service = Service(llama, ServerOptions(model="bench", max_queue=most))
    with listen(ADDRESS, 0) as listener, serve_in_thread(service, listener):
        yield ADDRESS, listener.getsockname()[1]


def parse_peers(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse_range(option: str, text: str) -> Range:
    """The range of an option such as 16-512. Raises LlamaError for anything else."""
    least, dash, most = text.partition("-")
    if not (dash and least.isdecimal() and most.isdecimal() and int(least) <= int(most)):
        raise LlamaError(f"{option} is {shorten(text)}, expected two whole numbers, the smaller first, such as 16-512")
    return Range(int(least), int(most))
