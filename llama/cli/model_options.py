"""Options that several commands share: which model to load, how to sample from it, how to make it fast.

Knows argparse, `Llama.build` and the names of settings; knows no command.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from .._util.console import print_note, working_note
from ..accelerate.quantization import BITS
from ..adapters.opening import find_base
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.loader import fetch_checkpoint, find_checkpoint
from ..checkpoints.recommended import FILE, read_recommended
from ..checkpoints.trained_length import describe_excess
from ..engine.request_checks import check_speculation
from ..engine.speculative import SPECULATE_K
from ..errors import make_printable
from ..generation import Llama
from ..parallel import initialize, raise_together
from ..settings import SETTINGS, Settings
from .program import checkpoint_or_demo

INTEGER: dict[str, Any] = {"metavar": "N", "type": int}
NUMBER: dict[str, Any] = {"metavar": "X", "type": float}
CKPT_DIR = "directory of the checkpoint, or its gs:// or az:// URL (default: the demo model)"
ADAPTER_DIR = "directory or URL of an adapter of peft's (its base, without ckpt_dir: the one that it names)"
TOKENIZER_PATH = "tokenizer.model or tokenizer.json (default: the one in ckpt_dir)"
DEVICE = "cpu, cuda or mps (default: the best there is)"
DTYPE = "bfloat16, float16, float32, or auto: as in the files (default: the best for the device)"


def add_model_options(command: argparse.ArgumentParser, standard: Mapping[str, Any] | None = None) -> None:
    """The options of commands that generate text. standard: settings whose defaults the command has itself."""
    add = command.add_argument_group("model").add_argument
    add("--ckpt_dir", metavar="DIR", help=CKPT_DIR)
    add("--adapter_dir", metavar="DIR", help=f"{ADAPTER_DIR}; merged while loading")
    add("--tokenizer_path", metavar="FILE", help=TOKENIZER_PATH)
    add("--max_seq_len", **INTEGER, default=512, help="most tokens of prompt and answer (default: 512)")
    add("--device", help=DEVICE)
    add("--dtype", help=DTYPE)
    add_sampling_options(command, standard)
    add_speed_options(command)
    why = "The model checks several proposed tokens at a time: the text is the same, and comes sooner."
    add = command.add_argument_group("speculative decoding", why).add_argument
    add("--draft_ckpt_dir", metavar="DIR", help="a smaller model of the same vocabulary, which proposes tokens")
    add("--lookup_ngram", **INTEGER, help="propose tokens that followed the last N tokens earlier in the text")
    add("--speculate_k", **INTEGER, default=SPECULATE_K, help="tokens to propose at a time (default: %(default)s)")


def add_sampling_options(command: argparse.ArgumentParser, standard: Mapping[str, Any] | None = None) -> None:
    """The fields of `Settings` that are options of commands, and the seed of a run."""
    standard = standard or {}
    why = "The model's generation_config.json, where it has one, overrides these defaults."
    group, defaults = command.add_argument_group("sampling", why), Settings()
    for name, setting in SETTINGS.items():
        default, parse = standard.get(name, getattr(defaults, name)), setting.values.parse
        if not setting.on_command_line:
            continue
        if isinstance(default, tuple):
            group.add_argument(f"--{name}", metavar="TEXT", action="append", default=[], help=setting.help)
        else:
            text = setting.help if default is None else f"{setting.help} (default: {default:g})"
            group.add_argument(f"--{name}", **INTEGER if parse is int else NUMBER, help=text)
    seed_help = standard.get("seed", "the same seed gives the same text (default: 1)")
    group.add_argument("--seed", **INTEGER, default=1, help=seed_help)


def add_speed_options(command: argparse.ArgumentParser) -> None:
    """The options that make a model fast."""
    add = command.add_argument_group("speed").add_argument
    add("--compile", action="store_true", help="compile or capture decoding steps at the start")
    add("--quantization", choices=sorted(BITS), help="round matrices to 4 or 8 bits while loading")
    add("--kernels", metavar="LEVEL", help="avx2, avx512 ..., or none: torch's own (default: the processor's fastest)")


def build_model(options: argparse.Namespace, max_batch_size: int = 1, model_parallel_size: int | None = None) -> Llama:
    """The model that `add_model_options` describe."""
    ckpt_dir = checkpoint_or_demo(options.ckpt_dir, options.adapter_dir)
    with working_note(f"loading {make_printable(ckpt_dir)}"):
        return Llama.build(
            ckpt_dir=ckpt_dir,
            adapter_dir=options.adapter_dir,
            tokenizer_path=options.tokenizer_path,
            max_seq_len=options.max_seq_len,
            max_batch_size=max_batch_size,
            model_parallel_size=model_parallel_size,
            seed=options.seed,
            draft_ckpt_dir=options.draft_ckpt_dir,
            compile=options.compile,
            quantization=options.quantization,
            device=options.device,
            dtype=options.dtype,
        )


def read_settings(options: argparse.Namespace, recommended: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The sampling settings: as the user set them, or else as recommended, or else the defaults of `Settings`.

    Raises LlamaError for a value that is out of range.
    """
    defaults = Settings()
    names = [name for name, setting in SETTINGS.items() if setting.on_command_line]
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = {**{name: getattr(defaults, name) for name in names}, **(recommended or {}), **chosen}
    Settings(**settings)
    return settings


def recommend_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the model's authors recommend; what comes of them is told in a line. Called on all ranks alike.

    So is a max_seq_len that the model wasn't made for.
    Raises LlamaError for an option that is out of range, where there is no checkpoint, or its file says what can't be.
    """
    read_settings(options)  # what is out of range is told before a checkpoint is looked for
    initialize(
        getattr(options, "model_parallel_size", None),
        options.device,
        None if options.dtype == "auto" else options.dtype,
    )
    directory = fetch_checkpoint(checkpoint_or_demo(options.ckpt_dir, options.adapter_dir))
    with raise_together():
        base, _ = find_base(directory, options.adapter_dir)
        checkpoint = Checkpoint(*find_checkpoint(base))
        found, excess = read_recommended(checkpoint), describe_excess(checkpoint, options.max_seq_len)
    if excess is not None:
        print_note(f"({excess})")
    defaults = Settings()
    used = {name: value for name, value in found.settings.items() if getattr(options, name, None) is None}
    told = [f"{name} {value}" for name, value in used.items() if value != getattr(defaults, name)]
    if told or found.ignored:
        ignored = f"; not used here: {', '.join(found.ignored)}" if found.ignored else ""
        print_note(f"({FILE}: {', '.join(told) or 'the defaults'}{ignored})")
    return found.settings


def read_speculation(options: argparse.Namespace) -> dict[str, Any]:
    """How to propose tokens. Raises LlamaError for a value that is out of range."""
    check_speculation(options.lookup_ngram, options.speculate_k)
    return {"lookup_ngram": options.lookup_ngram, "speculate_k": options.speculate_k}
