"""Options that several commands share: which model to load, how to sample from it, how to make it fast.

Knows argparse, `Llama.build` and the names of settings; knows no command.
"""

import argparse
from typing import Any

from ..accelerate.quantization import BITS
from ..engine.request_checks import check_speculation
from ..engine.speculative import SPECULATE_K
from ..generation import Llama
from ..settings import SETTINGS, Settings
from .program import checkpoint_or_demo

INTEGER: dict[str, Any] = {"metavar": "N", "type": int}
NUMBER: dict[str, Any] = {"metavar": "X", "type": float}
CKPT_DIR = "directory or URL of the checkpoint (default: the demo model)"
TOKENIZER_PATH = "tokenizer.model or tokenizer.json (default: the one in ckpt_dir)"
DEVICE = "cpu, cuda or mps (default: the best there is)"
DTYPE = "bfloat16, float16, float32, or auto: as in the files (default: the best for the device)"


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The options of commands that generate text."""
    add = command.add_argument_group("model").add_argument
    add("--ckpt_dir", metavar="DIR", help=CKPT_DIR)
    add("--tokenizer_path", metavar="FILE", help=TOKENIZER_PATH)
    add("--max_seq_len", **INTEGER, default=512, help="most tokens of prompt and answer (default: 512)")
    add("--device", help=DEVICE)
    add("--dtype", help=DTYPE)
    add_sampling_options(command)
    add_speed_options(command)
    why = "The model checks several proposed tokens at a time: the text is the same, and comes sooner."
    add = command.add_argument_group("speculative decoding", why).add_argument
    add("--draft_ckpt_dir", metavar="DIR", help="a smaller model of the same vocabulary, which proposes tokens")
    add("--lookup_ngram", **INTEGER, help="propose tokens that followed the last N tokens earlier in the text")
    add("--speculate_k", **INTEGER, default=SPECULATE_K, help="tokens to propose at a time (default: %(default)s)")


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """The fields of `Settings` that are options of commands, and the seed of a run."""
    group, defaults = command.add_argument_group("sampling"), Settings()
    for name, setting in SETTINGS.items():
        default, parse = getattr(defaults, name), setting.values.parse
        if not setting.on_command_line:
            continue
        if isinstance(default, tuple):
            group.add_argument(f"--{name}", metavar="TEXT", action="append", default=[], help=setting.help)
        else:
            text = setting.help if default is None else f"{setting.help} (default: {default:g})"
            group.add_argument(f"--{name}", **INTEGER if parse is int else NUMBER, default=default, help=text)
    group.add_argument("--seed", **INTEGER, default=1, help="the same seed gives the same text (default: 1)")


def add_speed_options(command: argparse.ArgumentParser) -> None:
    """The options that make a model fast."""
    add = command.add_argument_group("speed").add_argument
    add("--compile", action="store_true", help="compile or capture decoding steps at the start")
    add("--quantization", choices=sorted(BITS), help="round matrices to 4 or 8 bits while loading")


def build_model(options: argparse.Namespace, max_batch_size: int = 1) -> Llama:
    """The model that `add_model_options` describe."""
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


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings. Raises LlamaError for a value that is out of range."""
    settings = {name: getattr(options, name) for name, setting in SETTINGS.items() if setting.on_command_line}
    Settings(**settings)
    return settings


def read_speculation(options: argparse.Namespace) -> dict[str, Any]:
    """How to propose tokens. Raises LlamaError for a value that is out of range."""
    check_speculation(options.lookup_ngram, options.speculate_k)
    return {"lookup_ngram": options.lookup_ngram, "speculate_k": options.speculate_k}
