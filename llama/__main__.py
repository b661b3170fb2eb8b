"""`python -m llama chat` talks, `python -m llama complete "text"` goes on from a text. Thin: parse, call, print."""

import argparse

from .chat import say, talk
from .checks import check_room, check_sampling, check_texts
from .cli import checkpoint_or_demo, errors_in_one_line
from .generation import Llama


def model_options() -> argparse.ArgumentParser:
    """The options of every command that builds a model and samples from it."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("--ckpt_dir", help="directory of the checkpoint (default: the demo model)")
    add("--tokenizer_path", help="the tokenizer's file (default: tokenizer.model in ckpt_dir)")
    add("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default: %(default)s)")
    add("--top_p", type=float, default=0.9, help="draw from the likeliest tokens of this mass (default: %(default)s)")
    add("--max_seq_len", type=int, default=512, help="longest prompt and answer together (default: %(default)s tokens)")
    add("--max_gen_len", type=int, help="longest answer, in tokens (default: what fits in max_seq_len)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16, float16 or float32 (default: the best for the device)")
    add("--seed", type=int, default=1, help="the same seed gives the same text (default: %(default)s)")
    return options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llama", description="Run a Llama model; under torchrun, on ranks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chat_command = commands.add_parser("chat", parents=[model_options()], help="talk with the model")
    chat_command.add_argument("--system", help="the system message to start with")
    chat_command.set_defaults(run=chat)
    complete_command = commands.add_parser("complete", parents=[model_options()], help="go on from a text")
    complete_command.add_argument("text", help="the text to go on from")
    complete_command.set_defaults(run=complete)
    return parser.parse_args()


def build(options: argparse.Namespace) -> Llama:
    return Llama.build(
        ckpt_dir=checkpoint_or_demo(options.ckpt_dir),
        tokenizer_path=options.tokenizer_path,
        max_seq_len=options.max_seq_len,
        max_batch_size=1,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )


def chat(options: argparse.Namespace) -> None:
    check_sampling(options.max_gen_len, options.temperature, options.top_p)
    talk(build(options), options.system, (options.max_gen_len, options.temperature, options.top_p))


def complete(options: argparse.Namespace) -> None:
    """Show what follows the text, piece by piece as it is generated."""
    check_texts([options.text])
    check_sampling(options.max_gen_len, options.temperature, options.top_p)
    llama = build(options)
    prompt = llama.tokenizer.encode(options.text, bos=True, eos=False)
    check_room(prompt, options.max_seq_len)
    for (step,) in llama.stream([prompt], options.max_gen_len, options.temperature, options.top_p):
        say(step.text, end="")
    say("")


if __name__ == "__main__":
    options = parse()
    with errors_in_one_line():
        options.run(options)
