"""Options that several commands share: which model to load, how to sample from it, how to make it fast.

Knows argparse, `Llama.build` and the names of settings; knows no command.
"""

import argparse
from typing import Any

from ..accelerate.quantization import BITS
from ..engine.request_checks import check_speculation
from ..engine.speculative import SPECULATE_K
from ..generation import Llama
from ..settings import RowOptions, Settings, Speculation
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
    add = command.add_argument_group("sampling").add_argument
    add("--max_gen_len", **INTEGER, help="most tokens of an answer (default: as max_seq_len allows)")
    add("--temperature", **NUMBER, default=0.6, help="0 takes the likeliest token (default: 0.6)")
    add("--top_p", **NUMBER, default=0.9, help="draw from the likeliest tokens of mass X (default: 0.9)")
    add("--top_k", **INTEGER, help="draw from the N likeliest tokens (default: all)")
    add("--min_p", **NUMBER, default=0.0, help="drop tokens less than X times as likely as the likeliest (default: 0)")
    add("--repetition_penalty", **NUMBER, default=1.0, help="above 1, repeated tokens get less likely (default: 1)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end an answer before TEXT; may be repeated")
    add("--seed", **INTEGER, default=1, help="the same seed gives the same text (default: 1)")


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


def read_settings(options: argparse.Namespace) -> RowOptions:
    """The sampling settings. Raises LlamaError for a value that is out of range."""
    settings: RowOptions = {
        "max_gen_len": options.max_gen_len,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "stop": options.stop,
    }
    Settings(**settings)
    return settings


def read_speculation(options: argparse.Namespace) -> Speculation:
    """How to propose tokens. Raises LlamaError for a value that is out of range."""
    check_speculation(options.lookup_ngram, options.speculate_k)
    return {"lookup_ngram": options.lookup_ngram, "speculate_k": options.speculate_k}
