"""`python -m llama bench`: its options, and the report that it prints or draws."""

import argparse

from .._util.console import say
from .._util.ranks import is_main_process
from ..bench.measure import RAGGED
from ..bench.plots import Chart
from ..bench.runner import DEFAULT_SHAPE, DEMO_SHAPE, SHAPES, BenchConfig, parse_counts, run_benchmark
from ..bench.subjects import PEERS
from ..errors import LlamaError
from .model_options import ADAPTER_DIR, DEVICE, DTYPE, INTEGER, add_speed_options


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
    add("--batch", metavar="N", default="1", help="prompts at a time, or several such numbers: 1,8 (default: 1)")
    add("--prompt", metavar="N", default="512", help="tokens of a prompt, or several: 128,512,2048 (default: 512)")
    add("--gen", **INTEGER, default=64, help="tokens to generate for each prompt (default: 64)")
    add("--ragged", action="store_true", help=f"also prompts of {RAGGED.name} tokens, with {RAGGED.gen} new ones each")
    add("--repeats", **INTEGER, default=3, help="runs of each batch, after a warm-up (default: 3)")
    add("--compare", default="", metavar="PEERS", help=f"run these beside it: {', '.join(PEERS)}")
    add_speed_options(command)
    add = command.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one JSON object, for programs and for --with")
    add("--plot", metavar="FILE", help="draw speed by batch size, prompt length and ranks: .png, .svg or .pdf")
    add("--with", nargs="+", default=[], dest="earlier", metavar="FILE", help="also draw these outputs of --json")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    config = BenchConfig.from_options(
        options,
        batches=parse_counts("--batch", options.batch),
        prompts=parse_counts("--prompt", options.prompt),
        gen=options.gen,
        ragged=options.ragged,
        repeats=options.repeats,
        peers=[name for name in options.compare.split(",") if name],
    )
    if options.earlier and options.plot is None:
        raise LlamaError("--with was given without --plot: name the picture that it shall be drawn in")
    chart = Chart(options.plot, options.earlier) if options.plot is not None else None
    report = run_benchmark(config)
    say(report.as_json() if options.json else report.as_text())
    if chart is not None and is_main_process():
        chart.draw(report)
