"""`python -m llama`: `chat`, `complete` a text, `inspect` a checkpoint, `convert` it, `bench`.

Thin: parse, call, print.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .._util.console import say
from .._util.ranks import is_main_process
from .._util.validate import check_count, check_texts
from ..accelerate.quantization import BITS
from ..bench.measure import RAGGED
from ..bench.plots import Chart
from ..bench.runner import DEFAULT_SHAPE, DEMO_SHAPE, SHAPES, BenchConfig, carry_out, counts
from ..bench.subjects import PEERS
from ..checkpoints.convert import convert
from ..checkpoints.download import is_url
from ..checkpoints.formats import FORMATS
from ..checkpoints.inspect import report_on
from ..checkpoints.loader import survey
from ..engine.request_checks import check_room, check_speculation
from ..engine.speculative import SPECULATE_K
from ..errors import LlamaError, make_printable
from ..generation import Llama
from ..parallel import initialize, parse_dtype
from ..settings import SETTINGS, Settings
from .batch import complete_file
from .chat import talk
from .finetune import add_finetune
from .program import checkpoint_or_demo, errors_in_one_line


def model_options() -> argparse.ArgumentParser:
    """The options of every command that builds a model and samples from it."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("--ckpt_dir", help="directory or URL of the checkpoint (default: the demo model)")
    add("--tokenizer_path", help="tokenizer.model or tokenizer.json (default: the one in ckpt_dir)")
    add_sampling_options(options)
    add("--max_seq_len", type=int, default=512, help="longest prompt and answer together (default: %(default)s tokens)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16, float16, float32, or auto: the files' (default: the best for the device)")
    add("--draft_ckpt_dir", help="a smaller model of the same vocabulary, to propose tokens: the same text, sooner")
    add("--lookup_ngram", type=int, help="propose what followed the last so many tokens in the text before")
    add("--speculate_k", type=int, default=SPECULATE_K, help="tokens to propose at a time (default: %(default)s)")
    add("--seed", type=int, default=1, help="the same seed gives the same text (default: %(default)s)")
    add_form(options)
    return options


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """The fields of `Settings` that are options of commands."""
    defaults = Settings()
    for name, setting in SETTINGS.items():
        if not setting.on_command_line:
            continue
        default, parse = getattr(defaults, name), setting.values.parse
        if isinstance(default, tuple):
            command.add_argument(f"--{name}", action="append", default=[], metavar="TEXT", help=setting.help)
        else:
            text = setting.help if default is None else f"{setting.help} (default: {default})"
            metavar = "N" if parse is int else "X"
            command.add_argument(f"--{name}", type=parse, default=default, metavar=metavar, help=text)


def add_form(command: argparse.ArgumentParser) -> None:
    """The options that choose the fast form of a model."""
    add = command.add_argument
    add("--compile", action="store_true", help="compile or record all decoding steps before the first answer")
    add("--quantization", choices=sorted(BITS), help="round matrices to 8 or 4 bits as they are loaded")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llama", description="Run a Llama model; under torchrun, on ranks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chat_command = commands.add_parser("chat", parents=[model_options()], help="talk with the model")
    chat_command.add_argument("--system", help="the system message to start with")
    chat_command.set_defaults(run=chat)
    add_complete(commands.add_parser("complete", parents=[model_options()], help="go on from a text, or from many"))
    add_convert(commands.add_parser("convert", help="write a checkpoint in another layout"))
    add_inspect(commands.add_parser("inspect", help="say what a checkpoint's directory holds, and what is wrong there"))
    add_finetune(commands.add_parser("finetune", help="train a model, or a head on it, on records"))
    add_bench(commands.add_parser("bench", help="measure how fast a model runs here, beside what memory allows"))
    return parser.parse_args()


def add_complete(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("text", nargs="?", help="the text to go on from")
    add("--input", metavar="FILE", help='instead of a text: lines of {"prompt": ...} or {"messages": [...]}')
    add("--output", metavar="FILE", help="where the answers to --input go, a line each, in the same order")
    add("--max_batch_size", type=int, help="rows at a time, of --input (default: 4)")
    add("--force", action="store_true", help="begin anew, although --output is there or was begun")
    command.set_defaults(run=complete)


def add_inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("directory", metavar="DIR", help="directory of the checkpoint, of either layout; headers only are read")
    add("--mp_size", type=int, default=1, help="model-parallel ranks to divide it over (default: %(default)s)")
    add("--max_seq_len", type=int, default=512, help="longest prompt and answer together (default: %(default)s tokens)")
    add("--max_batch_size", type=int, default=4, help="prompts at a time (default: %(default)s)")
    add("--dtype", help="bfloat16, float16 or float32, to run in (default: that of the files)")
    add("--json", action="store_true", help="print one JSON object, for programs")
    command.set_defaults(run=inspect)


def add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("src", help="directory of a checkpoint in any layout that is read")
    add("dst", help="directory to write")
    add("--to", required=True, choices=list(FORMATS), help="Meta's layout, or Hugging Face's")
    add("--mp_size", type=int, default=1, help="shards to write in Meta's layout (default: %(default)s)")
    add("--dtype", help="bfloat16, float16 or float32 (default: that of each tensor)")
    add("--quantization", choices=sorted(BITS), help="store the matrices of layers rounded to 8 or 4 bits (--to hf)")
    add("--force", action="store_true", help="replace the checkpoint in dst")
    command.set_defaults(run=convert_checkpoint)


def add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--ckpt_dir", help="directory or URL of a checkpoint (default: random weights of --shape)")
    add("--shape", help=f"{', '.join([*SHAPES, DEMO_SHAPE])}: sizes of random weights (default: {DEFAULT_SHAPE})")
    add("--batch", default="1", help="rows, or several numbers of them: 1,8 (default: %(default)s)")
    add("--prompt", default="512", help="tokens of a prompt, or several: 128,512,2048 (default: %(default)s)")
    add("--gen", type=int, default=64, help="tokens that each row gets (default: %(default)s)")
    add("--ragged", action="store_true", help=f"also prompts of {RAGGED.name} tokens, {RAGGED.gen} new each")
    add("--repeats", type=int, default=3, help="of each batch, after a warm-up (default: %(default)s)")
    add("--compare", default="", metavar="PEERS", help=f"run beside it: {', '.join(PEERS)}")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16, float16, float32, or auto: the files' (default: the best for the device)")
    add_form(command)
    add("--json", action="store_true", help="print one JSON object, for programs and for --with")
    add("--plot", metavar="FILE", help="draw speed against batch size, prompt length and ranks: .png, .svg or .pdf")
    add("--with", nargs="+", default=[], dest="earlier", metavar="FILE", help="draw these outputs of --json too")
    command.set_defaults(run=bench)


def build(options: argparse.Namespace, max_batch_size: int = 1) -> Llama:
    return Llama.build(
        ckpt_dir=checkpoint_or_demo(options.ckpt_dir),
        tokenizer_path=options.tokenizer_path,
        max_seq_len=options.max_seq_len,
        max_batch_size=max_batch_size,
        seed=options.seed,
        draft_ckpt_dir=options.draft_ckpt_dir,
        compile=options.compile,
        quantization=options.quantization,
        device=options.device,
        dtype=options.dtype,
    )


def bench(options: argparse.Namespace) -> None:
    plan = BenchConfig.of(
        options,
        batches=counts("--batch", options.batch),
        prompts=counts("--prompt", options.prompt),
        gen=options.gen,
        ragged=options.ragged,
        repeats=options.repeats,
        peers=[name for name in options.compare.split(",") if name],
    )
    if options.earlier and options.plot is None:
        raise LlamaError("--with was given without --plot: name the picture that it shall be drawn in")
    chart = Chart(options.plot, options.earlier) if options.plot is not None else None
    report = carry_out(plan)
    say(report.as_json() if options.json else report.as_text())
    if chart is not None and is_main_process():
        chart.draw(report)


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings. Raises LlamaError for a value that is out of range."""
    settings = {name: getattr(options, name) for name, setting in SETTINGS.items() if setting.on_command_line}
    Settings(**settings)
    return settings


def speculation_of(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are to be proposed. Raises LlamaError for what can't be."""
    check_speculation(options.lookup_ngram, options.speculate_k)
    return {"lookup_ngram": options.lookup_ngram, "speculate_k": options.speculate_k}


def chat(options: argparse.Namespace) -> None:
    settings = {**read_settings(options), **speculation_of(options)}
    talk(build(options), options.system, settings)


def convert_checkpoint(options: argparse.Namespace) -> None:
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    convert(options.src, options.dst, options.to, options.mp_size, dtype, options.force, options.quantization)
    say(f"wrote {options.dst}: {', '.join(sorted(path.name for path in Path(options.dst).iterdir()))}")


def complete(options: argparse.Namespace) -> None:
    """Show what follows the text, piece by piece as it is generated; or answer a whole file."""
    of_files = {name: getattr(options, name) for name in ("output", "max_batch_size", "force")}
    if (options.text is None) == (options.input is None):
        raise LlamaError("give either a text or --input: there are " + ("both" if options.input else "neither"))
    if options.input is not None:
        return complete_lines(options)
    if given := [name for name, value in of_files.items() if value]:
        raise LlamaError(f"--{given[0]} belongs to --input, and a text was given")
    check_texts([options.text])
    settings = {**read_settings(options), **speculation_of(options)}
    llama = build(options)
    prompt = llama.tokenizer.encode(options.text, bos=True, eos=False)
    check_room(prompt, options.max_seq_len)
    for steps in llama.stream([prompt], **settings):
        say("".join(step.text for step in steps), end="")
    say("")


def complete_lines(options: argparse.Namespace) -> None:
    if options.output is None:
        raise LlamaError("--input needs --output: name the file that the answers shall go to")
    rows = 4 if options.max_batch_size is None else options.max_batch_size
    check_count("max_batch_size", rows)
    initialize(None, options.device, None if options.dtype == "auto" else options.dtype)
    ckpt_dir = checkpoint_or_demo(options.ckpt_dir)
    names = ("tokenizer_path", "max_seq_len", "dtype", "quantization")
    about = {name: getattr(options, name) for name in names}
    about["ckpt_dir"] = ckpt_dir if is_url(ckpt_dir) else os.path.realpath(ckpt_dir)
    made = (options.input, options.output, {**read_settings(options)}, options.seed, about, options.force)
    summary = complete_file(*made, lambda: build(options, rows), speculation_of(options))
    if summary is not None and sys.stderr is not None:
        print(make_printable(summary), file=sys.stderr)


def inspect(options: argparse.Namespace) -> None:
    """Exit status 1 when something is wrong, so that scripts can ask."""
    report = report_on(
        survey(options.directory),
        mp_size=options.mp_size,
        max_seq_len=options.max_seq_len,
        max_batch_size=options.max_batch_size,
        dtype=options.dtype,
    )
    say(report.as_json() if options.json else report.as_text())
    if not report.ok:
        sys.exit(1)


def main() -> None:
    options = parse()
    with errors_in_one_line():
        options.run(options)
