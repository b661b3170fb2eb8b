"""`python -m llama finetune`: its options, and the TrainingConfig that they make."""

import argparse
from typing import Any

from ..adapters.lora import Lora
from ..errors import LlamaError
from ..training.config import TrainingConfig
from ..training.registry import TRAINING_TASKS
from ..training.trainer import finetune
from .model_options import CKPT_DIR, DEVICE, INTEGER, NUMBER, TOKENIZER_PATH
from .program import checkpoint_or_demo

CONFIG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {  # fields of TrainingConfig: kind of value, help
    "epochs": (INTEGER, "how often every example is trained on"),
    "batch_size": (INTEGER, "examples of a step"),
    "micro_batch_size": (INTEGER, "how many of them are computed at a time (default: all)"),
    "learning_rate": (NUMBER, "the highest learning rate"),
    "warmup": (NUMBER, "share of the steps in which it rises; then it falls to 0"),
    "weight_decay": (NUMBER, "weight decay of matrices"),
    "clip": (NUMBER, "the largest norm of a gradient"),
    "every": (INTEGER, "steps between evaluations, where a killed run resumes too (default: an epoch)"),
    "patience": (INTEGER, "stop after N evaluations without a better one (default: never)"),
    "max_seq_len": (INTEGER, "most tokens of an example"),
    "seed": (INTEGER, "the same seed gives the same model"),
}


RECORDS = """what a line of --data and --eval holds, for each --task:
  classify  {"text": "...", "label": "music"}; a number as label makes it a regression
            {"text": "...", "labels": ["music", "sports"]} makes it several labels a text
  tag       {"text": "Ida lives in Oslo.", "spans": [{"start": 13, "end": 17, "label": "PLACE"}]}
  answer    {"question": "...", "context": "...", "answers": [{"text": "Riga", "start": 18}]}
  language  {"text": "..."} or {"prompt": "...", "completion": "..."} or {"messages": [...]}"""


def add_options(command: argparse.ArgumentParser) -> None:
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, RECORDS
    add = command.add_argument
    add(
        "--task",
        required=True,
        choices=list(TRAINING_TASKS),
        help="what to train: see below",
    )
    add("--data", required=True, metavar="FILE", help="JSON lines to train on")
    add("--eval", metavar="FILE", help="JSON lines to evaluate on, which are not trained on")
    add("--output", required=True, metavar="DIR", help="where the model, its curves and its progress go")
    add("--force", action="store_true", help="start over, even if --output exists or was begun")
    add = command.add_argument_group("model").add_argument
    add("--ckpt_dir", metavar="DIR", help=CKPT_DIR)
    add("--adapter_dir", metavar="DIR", help="an adapter of peft's to train further, in place of a new one")
    add("--tokenizer_path", metavar="FILE", help=TOKENIZER_PATH)
    add(
        "--model_parallel_size",
        metavar="N",
        type=int,
        help="ranks that share a model; others hold copies (default: all)",
    )
    add("--device", help=DEVICE)
    add("--dtype", help="bfloat16 or float32, to compute in (default: the best for the device)")
    add = command.add_argument_group("training").add_argument
    for name, (kind, purpose) in CONFIG_OPTIONS.items():
        default = getattr(TrainingConfig, name)
        shown = purpose if default is None else f"{purpose} (default: {default:g})"
        add(f"--{name}", **kind, default=default, help=shown)
    add("--recompute", action="store_true", help="compute layers again for the gradient, to save memory")
    add = command.add_argument_group("low-rank adapters (LoRA)").add_argument
    add("--lora_r", **INTEGER, help="train adapters of rank N instead of the model's own weights")
    add("--lora_alpha", **NUMBER, help="adapters are scaled by X / lora_r (default: twice lora_r)")
    add("--lora_targets", metavar="NAMES", help="layers to adapt, of wq,wk,wv,wo,w1,w2,w3,output (default: wq,wv)")
    add("--lora_dropout", **NUMBER, help="dropout of the adapters' inputs in training (default: 0)")
    add("--adapter_only", action="store_true", help="write only the adapter, and no model with the adapter merged")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    adapter_options = [name for name, value in vars(options).items() if name.startswith("lora_") and value is not None]
    adapter_options += ["adapter_only"] * (options.adapter_only and options.adapter_dir is None)
    if adapter_options and options.lora_r is None:
        raise LlamaError(f"--{adapter_options[0]} was given without --lora_r: say of what rank adapters shall be")
    lora = None
    if options.lora_r is not None:
        alpha = 2.0 * options.lora_r if options.lora_alpha is None else options.lora_alpha
        targets = tuple((options.lora_targets or "wq,wv").split(","))
        lora = Lora(options.lora_r, alpha, targets, options.lora_dropout or 0.0)
    names = ("task", "data", "output", "eval", "recompute", *CONFIG_OPTIONS)
    fields = {name: getattr(options, name) for name in names}
    fields |= {"adapter_dir": options.adapter_dir, "merge": not options.adapter_only}
    config = TrainingConfig(**fields, lora=lora)
    finetune(
        config,
        checkpoint_or_demo(options.ckpt_dir, options.adapter_dir),
        options.tokenizer_path,
        options.model_parallel_size,
        device=options.device,
        dtype=options.dtype,
        force=options.force,
    )
