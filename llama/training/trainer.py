"""The loop that trains a model, on model-parallel ranks and data-parallel copies.

Knows models, batches and optimizers. What survives a kill is in `state`, what is measured in `evaluation`, what each
step gets in `schedule`.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import get_data_parallel_rank, get_data_parallel_world_size
from torch import nn

from .. import parallel
from .._util.console import ProgressBar, progress_bar, say
from ..adapters.lora import add_lora, has_lora
from ..adapters.peft import save_adapter
from ..checkpoints.convert import check_target
from ..checkpoints.fit import check_weights
from ..checkpoints.loader import holds_adapter
from ..checkpoints.task_spec import SPECS
from ..errors import LlamaError
from ..parallel import Place
from ..tasks.model import TaskModel
from ..tasks.registry import TASKS
from ..tokenization.chat_template import make_formatter
from . import gradients
from .config import TrainingConfig, describe_job
from .dataset import Line, collate, find_problem_type, make_examples, name_classes, read_lines
from .evaluation import check_packages, choose_best_metric, draw_curves, evaluate, get_loss
from .preprocessing import Example, Preprocessor
from .record_formats import Record
from .schedule import compute_learning_rate, group_by_decay, seed_generators, shuffle_indices
from .state import Progress, ResumableTraining

ADAM_BYTES = 16  # of each trained number: itself, its gradient and two moments, in float32
BETAS = 0.9, 0.98


def finetune(
    config: TrainingConfig,
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    model_parallel_size: int | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Train, and write the best model to `config.output`. A run that was killed resumes, with the same result.

    model_parallel_size: ranks that share a model; None: all. Further ranks hold data-parallel copies. dtype: what
    products are computed in; trained weights are float32 all the same. force: begin anew, whatever is in the output.
    Raises LlamaError, on all ranks.
    """
    place = parallel.initialize(model_parallel_size, device, dtype)
    with parallel.raise_together():
        if place.dtype == torch.float16:
            raise LlamaError("float16 has too few exponents for gradients: train in bfloat16 or float32")
        check_packages(config.eval is not None)
    train_lines, eval_lines = read_data(config)
    with parallel.raise_together():
        head = describe_head(config, train_lines, eval_lines)
    job = describe_job(config, place, ckpt_dir, tokenizer_path, [*train_lines, *eval_lines])
    files = ResumableTraining(Path(config.output), job, force)
    if files.progress.ended:
        say(f"{config.output}: all is done already")
        return
    is_adapted = config.lora is not None or config.adapter_dir is not None or holds_adapter(ckpt_dir)
    model = TaskModel.build(
        ckpt_dir,
        tokenizer_path,
        config.max_seq_len,
        config.micro_batch_size or config.batch_size,
        model_parallel_size,
        task=config.task,
        adapter_dir=config.adapter_dir,
        device=device,
        dtype=place.dtype if is_adapted else torch.float32,
        **head,
    )
    Training(config, model, place, train_lines, eval_lines, files).run()
    if parallel.is_main_process():
        say(f"wrote {config.output}: {', '.join(sorted(path.name for path in Path(config.output).iterdir()))}")


def read_data(config: TrainingConfig) -> tuple[list[Line], list[Line]]:
    """The lines to train on and those to evaluate on, read by one rank. Called on all ranks."""
    paths = [config.data] if config.eval is None else [config.data, config.eval]
    with parallel.raise_together():
        read = [read_lines(path, config.task) for path in paths] if parallel.is_main_process() else []
    train_lines, *rest = parallel.broadcast_object(read)
    return train_lines, rest[0] if rest else []


def describe_head(config: TrainingConfig, train_lines: Sequence[Line], eval_lines: Sequence[Line]) -> dict[str, Any]:
    """`labels` and `problem_type` of the head. Raises LlamaError unless both files have one kind of labels."""
    problem_type = find_problem_type(train_lines, config.task, config.data)
    if eval_lines:
        other = find_problem_type(eval_lines, config.task, config.eval or "")
        if other != problem_type:
            raise LlamaError(f"{config.data} is {problem_type} and {config.eval} {other}: expected one kind of labels")
    return {"labels": name_classes([*train_lines, *eval_lines], config.task), "problem_type": problem_type}


class Training:
    """A model in training."""

    config: TrainingConfig
    model: TaskModel
    place: Place  # where this rank runs
    files: ResumableTraining  # what survives a kill
    progress: Progress  # that of `files`, which each step updates
    train_examples: list[Example]
    eval_examples: list[Example]
    eval_records: list[Record]  # of the same lines as `eval_examples`
    parameters: dict[str, nn.Parameter]  # those that are trained, by name
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    steps: int  # in all epochs

    def __init__(
        self,
        config: TrainingConfig,
        model: TaskModel,
        place: Place,
        train_lines: Sequence[Line],
        eval_lines: Sequence[Line],
        files: ResumableTraining,
    ):
        """Called on all ranks. Raises LlamaError for records that don't fit, and for too little memory."""
        self.config, self.model, self.place = config, model, place
        self.files, self.progress = files, files.progress
        self.eval_records = [line.record for line in eval_lines]
        with parallel.raise_together():
            labels = model.checkpoint.head.labels if model.checkpoint.head else ()
            formatter = make_formatter(model.tokenizer, datetime.fromisoformat(self.progress.begun))
            classes = {name: i for i, name in enumerate(labels)}
            preprocessor = Preprocessor(model.tokenizer, formatter, classes, config.max_seq_len)
            self.train_examples = make_examples(preprocessor, config.task, train_lines, config.data)
            self.eval_examples = make_examples(preprocessor, config.task, eval_lines, config.eval or "")
            check_target(model.checkpoint, files.directory, force=True)
            if config.lora is not None:
                add_lora(model.model, config.lora, config.seed)
            elif model.checkpoint.adapter is not None and not has_lora(model.model):
                raise LlamaError(
                    f"{model.checkpoint.adapter} adapts no linear layer, which could be trained further: write a model "
                    "with it merged (python -m llama convert), and train that"
                )
            elif not has_lora(model.model):
                check_weights(model.model.params, place, ADAM_BYTES, "train with lora")
        for parameter in self.head_parameters().values():
            parameter.data = parameter.data.float()
        if config.recompute:
            gradients.checkpoint_layers(model.model)
        self.parameters = {n: p for n, p in model.head.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # also on a rank that gets no examples in a step
        groups = group_by_decay(self.parameters.values(), config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, foreach=True)
        self.steps_per_epoch = math.ceil(len(self.train_examples) / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch

    def head_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.model.head.get_parameter(name) for name in SPECS[self.config.task].tensors}

    def run(self) -> None:
        """Do all steps that aren't done yet."""
        every = self.config.every or self.steps_per_epoch
        self.files.begin()
        if self.progress.step > 0:
            self.files.restore(self.load_state)
            say(f"{self.files.directory}: going on after step {self.progress.step}")
        with progress_bar("training", self.steps, " steps", done=self.progress.step) as bar:
            while self.progress.step < self.steps and not self.progress.ended:
                self.progress.losses.append(self.step())
                self.progress.step += 1
                bar.set_postfix_str(f"loss {self.progress.losses[-1]:.3f}", refresh=False)
                bar.update()
                if self.progress.step % every == 0 or self.progress.step == self.steps:
                    self.evaluate_and_save(bar)

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """One step of the optimizer. Returns the mean loss of its examples."""
        config, step = self.config, self.progress.step
        loss = self.backward(self.select_batch(step))
        gradients.sum_over_ranks(self.model.head, self.model.model.params)
        norm = float(gradients.clip(self.model.head, self.model.model.params, config.clip))
        self.check_finite({"loss": loss, "norm of the gradient": norm}, step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(config, step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss

    def select_batch(self, step: int) -> list[Example]:
        """The examples of a step. An epoch has every example once, in its own order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = shuffle_indices(len(self.train_examples), self.config.seed, epoch)
        size = self.config.batch_size
        return [self.train_examples[i] for i in order[place * size : (place + 1) * size]]

    def backward(self, batch: list[Example]) -> float:
        """Add this rank's share of a batch to the gradients. Returns the loss of the whole batch."""
        copy, copies = get_data_parallel_rank(), get_data_parallel_world_size()
        size = self.config.micro_batch_size or math.ceil(len(batch) / copies)
        batch = sorted(batch, key=lambda example: len(example.tokens))
        micro_batches = [batch[i : i + size] for i in range(0, len(batch), size)]
        items = sum(example.items for example in batch)
        total = torch.zeros((), device=self.place.device)
        self.model.head.train()
        with seed_generators(self.place.device, self.config.seed, self.progress.step, copy):
            for micro_batch in micro_batches[copy::copies]:
                with self.autocast():
                    output = self.model.head(**collate(micro_batch, self.config.task, self.place.device))
                loss = get_loss(output) * (sum(example.items for example in micro_batch) / items)
                loss.backward()
                total += loss.detach()
        return float(gradients.sum_over_copies(total))

    def check_finite(self, values: dict[str, float], step: int) -> None:
        """Raise LlamaError unless all values, which all ranks have alike, are finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                with parallel.raise_together():
                    raise LlamaError(f"step {step}: the {name} is {value}: lower the learning rate")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.place.device.type, self.place.dtype, enabled=self.place.dtype != torch.float32)

    # --- between steps ----------------------------------------------------------------------------------------------

    def evaluate_and_save(self, bar: ProgressBar) -> None:
        """Evaluate, write the model if it is the best so far, and save the state from which a killed run resumes."""
        is_best = self.add_entry()
        with bar.external_write_mode():
            say(format_entry(self.progress.history[-1]))
        if is_best and (self.eval_records or self.progress.ended):
            self.save_model()
        with parallel.raise_together():
            if parallel.is_main_process():
                draw_curves(self.progress.losses, self.progress.history, self.files.directory / "curves.png")
        parameters = {name: parameter.data for name, parameter in self.parameters.items()}
        self.files.save({"parameters": parameters, "optimizer": self.optimizer.state_dict()})

    def add_entry(self) -> bool:
        """Evaluate, and add an entry to the history. Returns whether the model is the best so far.

        Sets `progress.ended` after the last step, and when patience is exhausted.
        """
        progress, patience = self.progress, self.config.patience
        losses = progress.losses[progress.history[-1]["step"] if progress.history else 0 :]
        entry: dict[str, float] = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch}
        entry["trained"] = math.fsum(losses) / len(losses)
        is_best = not self.eval_records
        if self.eval_records:
            with self.autocast():
                entry |= evaluate(self.model, self.eval_examples, self.eval_records)
            self.check_finite({"held-out loss": entry["loss"]}, progress.step)
            name = choose_best_metric(self.model)
            value = -entry["loss"] if name == "loss" else entry[name]
            is_best = progress.best is None or value > progress.best
            progress.best = value if is_best else progress.best
            progress.waited = 0 if is_best else progress.waited + 1
        progress.history.append(entry)
        progress.ended = progress.step == self.steps or (patience is not None and progress.waited >= patience)
        return is_best

    def save_model(self) -> None:
        """Write the model with any adapter merged, and the adapter by itself."""
        directory, config = self.files.directory, self.config
        is_adapted = has_lora(self.model.model)
        if not is_adapted or config.merge:
            self.model.save(directory, force=True)
        if is_adapted:
            checkpoint = self.model.checkpoint
            save_adapter(
                self.model.model,
                directory / "adapter",
                str(checkpoint.directory),
                extra={name: parameter.data for name, parameter in self.head_parameters().items()},
                task_type=TASKS[config.task].peft_type,
                prefix=checkpoint.body,
                family=checkpoint.family,
            )

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `evaluate_and_save` saved."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def format_entry(entry: dict[str, float]) -> str:
    """An entry of the history as a line for people."""
    names = {"trained": "loss", "loss": "held-out loss"}
    metrics = [f"{names.get(name, name)} {value:.4g}" for name, value in entry.items() if name not in ("step", "epoch")]
    return f"step {entry['step']}, epoch {entry['epoch']:.2f}: {', '.join(metrics)}"
