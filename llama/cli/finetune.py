"""`python -m llama finetune`: its options, and the plan that they make. Thin: parse, call."""

import argparse

from ..adapters.lora import Lora
from ..checkpoints.task_spec import TENSORS
from ..errors import LlamaError
from ..training.config import TrainingConfig
from ..training.trainer import finetune
from .program import checkpoint_or_demo

OPTIONS: dict[str, tuple[type, str]] = {  # fields of a plan: type, what it says
    "epochs": (int, "how often every example is learnt from"),
    "batch_size": (int, "examples a step"),
    "micro_batch_size": (int, "of those, at a time (default: all)"),
    "learning_rate": (float, "at its highest"),
    "warmup": (float, "share of the steps in which it rises; then it falls to 0"),
    "weight_decay": (float, "of matrices"),
    "clip": (float, "the largest norm of a gradient"),
    "every": (int, "steps between evaluations, where a killed run goes on too (default: an epoch)"),
    "patience": (int, "end after so many evaluations without a better one (default: never)"),
    "max_seq_len": (int, "the longest text, in tokens"),
    "seed": (int, "the same seed gives the same model"),
}


def add_finetune(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--task", required=True, choices=list(TENSORS), help="what to learn; README.md shows the records of each")
    add("--data", required=True, metavar="FILE", help="lines of JSON to learn from")
    add("--eval", metavar="FILE", help="lines of JSON to measure on, from which nothing is learnt")
    add("--output", required=True, metavar="DIR", help="where the model, its curves and its progress go")
    add("--ckpt_dir", help="directory or URL of the checkpoint to begin with (default: the demo model)")
    add("--tokenizer_path", help="tokenizer.model or tokenizer.json (default: the one in ckpt_dir)")
    for name, (kind, says) in OPTIONS.items():
        default = getattr(TrainingConfig, name)
        add(f"--{name}", type=kind, default=default, help=says if default is None else f"{says} (default: {default:g})")
    add("--recompute", action="store_true", help="compute layers again for the gradient, which takes less memory")
    add("--lora_r", type=int, help="train adapters of this rank instead of the model's own weights")
    add("--lora_alpha", type=float, help="an adapter counts as much as lora_alpha / lora_r (default: twice lora_r)")
    add("--lora_targets", help="layers that get one, of wq,wk,wv,wo,w1,w2,w3,output (default: wq,wv)")
    add("--lora_dropout", type=float, help="share of an adapter's input that is left out in training (default: 0)")
    add("--adapter_only", action="store_true", help="write the adapter alone, and no model that has it merged")
    add("--model_parallel_size", type=int, help="ranks that share a model; others have copies of it (default: all)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", help="bfloat16 or float32, to compute in (default: the best for the device)")
    add("--force", action="store_true", help="begin anew, although --output is there or was begun")
    command.set_defaults(run=train)


def train(options: argparse.Namespace) -> None:
    given = [name for name, value in vars(options).items() if name.startswith("lora_") and value is not None]
    given += ["adapter_only"] * options.adapter_only
    if given and options.lora_r is None:
        raise LlamaError(f"--{given[0]} was given without --lora_r: say of what rank adapters shall be")
    lora = None
    if options.lora_r is not None:
        alpha = 2.0 * options.lora_r if options.lora_alpha is None else options.lora_alpha
        targets = tuple((options.lora_targets or "wq,wv").split(","))
        lora = Lora(options.lora_r, alpha, targets, options.lora_dropout or 0.0)
    named = {name: getattr(options, name) for name in ("task", "data", "output", "eval", "recompute", *OPTIONS)}
    plan = TrainingConfig(**named, lora=lora, merge=not options.adapter_only)
    where = checkpoint_or_demo(options.ckpt_dir), options.tokenizer_path, options.model_parallel_size
    finetune(plan, *where, device=options.device, dtype=options.dtype, force=options.force)
