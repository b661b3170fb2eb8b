"""Training: a plan, and how a model is brought through its steps on model-parallel ranks and data-parallel copies.

Knows models, batches and optimizers; leaves what survives a kill to `progress`, what is measured to `evaluation`.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import get_data_parallel_rank, get_data_parallel_world_size
from torch import Tensor, nn

from .. import parallel
from .._util.console import ProgressBar, progress_bar, say
from ..adapters.lora import add_lora
from ..adapters.peft import Task as PeftTask
from ..adapters.peft import save_adapter
from ..checkpoints.convert import check_target
from ..checkpoints.fit import check_weights
from ..checkpoints.task_spec import TENSORS, Task
from ..errors import LlamaError
from ..parallel import Place
from ..tasks.model import TaskModel
from ..tokenization.chat_template import make_formatter
from . import gradients
from .config import TrainingConfig, about, problem_in
from .dataset import Record, labels_in, read_records
from .evaluation import check_packages, decides, draw, measured
from .preprocessing import Example, Preprocessor, collated, examples
from .state import Keeper

PEFT_TASKS: dict[Task, PeftTask] = {
    "language": "CAUSAL_LM",
    "classify": "SEQ_CLS",
    "tag": "TOKEN_CLS",
    "answer": "QUESTION_ANS",
}
ADAM_BYTES = 16  # of each number that is trained: itself, its gradient and two moments, in float32
BETAS = 0.9, 0.98


def finetune(
    plan: TrainingConfig,
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    model_parallel_size: int | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Train, and write the best model to `plan.output`; a run that was killed goes on where it was, to the same end.

    dtype: what products are computed in; weights that are trained are float32 all the same. Ranks beyond
    model_parallel_size, None: all of them, are data-parallel copies. Raises LlamaError, on all ranks.
    """
    place = parallel.initialize(model_parallel_size, device, dtype)
    with parallel.raise_together():
        if place.dtype == torch.float16:
            raise LlamaError("float16 has too few exponents for gradients: train in bfloat16 or float32")
        check_packages(plan.eval is not None)
        files = [plan.data] if plan.eval is None else [plan.data, plan.eval]
        read = [read_records(path, plan.task) for path in files] if parallel.is_main_process() else []
    trained, held = (*parallel.broadcast_object(read), [])[:2]
    with parallel.raise_together():
        problem = problem_in(plan, trained, held) if plan.task == "classify" else None
        labels = labels_in([*trained, *held], plan.task, problem)
    kept = about(plan, place, ckpt_dir, tokenizer_path, [*trained, *held])
    keeper = Keeper(Path(plan.output), kept, force)
    if keeper.progress.ended:
        say(f"{plan.output}: all is done already")
        return
    sizes = plan.max_seq_len, plan.micro_batch_size or plan.batch_size
    frozen = place.dtype if plan.lora else torch.float32
    options: dict[str, Any] = {"task": plan.task, "labels": labels, "problem_type": problem}
    options |= {"device": device, "dtype": frozen}
    built = TaskModel.build(ckpt_dir, tokenizer_path, *sizes, model_parallel_size, **options)
    Training(plan, built, place, trained, held, keeper).run()


class Training:
    """A model on its way: optimizer, place in the data, what was measured."""

    def __init__(
        self,
        plan: TrainingConfig,
        built: TaskModel,
        place: Place,
        trained: Sequence[Record],
        held: Sequence[Record],
        keeper: Keeper,
    ):
        self.plan, self.built, self.place, self.held = plan, built, place, held
        self.keeper, self.progress = keeper, keeper.progress
        with parallel.raise_together():
            labels = built.checkpoint.head.labels if built.checkpoint.head else ()
            form = make_formatter(built.tokenizer, datetime.fromisoformat(self.progress.begun))
            reader = Preprocessor(built.tokenizer, form, {name: i for i, name in enumerate(labels)}, plan.max_seq_len)
            self.examples = examples(reader, plan.task, trained, plan.data)
            self.held_examples = examples(reader, plan.task, held, plan.eval or "")
            check_target(built.checkpoint, keeper.directory, force=True)
            if plan.lora is None:
                check_weights(built.model.params, place, ADAM_BYTES, "train with lora")
            else:
                add_lora(built.model, plan.lora, plan.seed)
        for name in TENSORS[plan.task]:
            built.head.get_parameter(name).data = built.head.get_parameter(name).data.float()
        if plan.recompute:
            gradients.checkpoint_layers(built.model)
        self.parameters = {n: p for n, p in built.head.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # on every rank, whatever it is given to learn
        self.optimizer = torch.optim.AdamW(decaying(self.parameters, plan.weight_decay), betas=BETAS, foreach=True)
        self.steps_per_epoch = math.ceil(len(self.examples) / plan.batch_size)
        self.steps = plan.epochs * self.steps_per_epoch

    def run(self) -> None:
        every = self.plan.every or self.steps_per_epoch
        self.keeper.begin()
        if self.progress.step > 0:
            self.keeper.restore(self.resume)
            say(f"{self.keeper.directory}: going on after step {self.progress.step}")
        with progress_bar("training", self.steps, " steps", done=self.progress.step) as bar:
            while self.progress.step < self.steps and not self.progress.ended:
                self.progress.losses.append(self.step())
                self.progress.step += 1
                bar.set_postfix_str(f"loss {self.progress.losses[-1]:.3f}", refresh=False)
                bar.update()
                if self.progress.step % every == 0 or self.progress.step == self.steps:
                    self.pause(bar)

    def step(self) -> float:
        """One of the optimizer's: the loss of its examples, each of which counts by how much is learnt of it."""
        batch = self.batch(self.progress.step)
        items = sum(example.items for example in batch)
        size = self.plan.micro_batch_size or math.ceil(len(batch) / get_data_parallel_world_size())
        batch.sort(key=lambda example: len(example.tokens))
        micros = [batch[i : i + size] for i in range(0, len(batch), size)]
        total = torch.zeros((), device=self.place.device)
        self.built.head.train()
        with self.chance(self.progress.step):
            for micro in micros[get_data_parallel_rank() :: get_data_parallel_world_size()]:
                with self.autocast():
                    found = self.built.head(**collated(micro, self.plan.task, self.place.device))
                loss = (found if isinstance(found, Tensor) else found.loss) * (sum(e.items for e in micro) / items)
                loss.backward()
                total += loss.detach()
        gradients.complete(self.built.head, self.built.model.params)
        norm = float(gradients.clip(self.built.head, self.built.model.params, self.plan.clip))
        loss_of_all = float(gradients.over_copies(total))
        self.check_finite({"loss": loss_of_all, "norm of the gradient": norm}, self.progress.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, self.progress.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss_of_all

    def check_finite(self, found: dict[str, float], step: int) -> None:
        """Numbers that all ranks have alike. Raises LlamaError."""
        for name, value in found.items():
            if not math.isfinite(value):
                with parallel.raise_together():
                    raise LlamaError(f"step {step}: the {name} is {value}: lower the learning rate")

    def batch(self, step: int) -> list[Example]:
        """What a step learns from: an epoch has every example once, in an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = order_of(len(self.examples), self.plan.seed, epoch)
        own = order[place * self.plan.batch_size : (place + 1) * self.plan.batch_size]
        return [self.examples[i] for i in own]

    @contextlib.contextmanager
    def chance(self, step: int) -> Iterator[None]:
        """Torch's own generators, which dropout asks, as they are in this step and data-parallel copy of every run."""
        device = self.place.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.plan.seed} {step} {get_data_parallel_rank()}").getrandbits(63))
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.place.device.type, self.place.dtype, enabled=self.place.dtype != torch.float32)

    # --- between the steps ------------------------------------------------------------------------------------------

    def pause(self, bar: ProgressBar) -> None:
        """Measure, keep the best model, and let a run that is killed from now on go on from here."""
        progress, plan = self.progress, self.plan
        told: dict[str, float] = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch}
        losses = progress.losses[progress.history[-1]["step"] if progress.history else 0 :]
        told["trained"] = math.fsum(losses) / len(losses)
        better = not self.held
        if self.held:
            with self.autocast():
                told |= measured(self.built, self.held_examples, self.held)
            self.check_finite({"held-out loss": told["loss"]}, progress.step)
            name = decides(plan.task, is_regression(self.built))
            value = -told["loss"] if name == "loss" else told[name]
            better = progress.best is None or value > progress.best
            progress.best = value if better else progress.best
            progress.waited = 0 if better else progress.waited + 1
        progress.history.append(told)
        progress.ended = progress.step == self.steps or (plan.patience is not None and progress.waited >= plan.patience)
        with bar.external_write_mode():
            say(line_of(told))
        if better and (self.held or progress.ended):
            self.write()
        with parallel.raise_together():
            if parallel.is_main_process():
                draw(progress.losses, progress.history, self.keeper.directory / "curves.png")
        parameters = {name: parameter.data for name, parameter in self.parameters.items()}
        self.keeper.keep({"parameters": parameters, "optimizer": self.optimizer.state_dict()})

    def write(self) -> None:
        """The model as it is now: whole, with what an adapter adds, and the adapter by itself."""
        directory, plan = self.keeper.directory, self.plan
        if plan.lora is None or plan.merge:
            self.built.save(directory, force=True)
        if plan.lora is not None:
            head = {name: self.built.head.get_parameter(name).data for name in TENSORS[plan.task]}
            checkpoint = self.built.checkpoint
            save_adapter(
                self.built.model,
                directory / "adapter",
                str(checkpoint.directory),
                extra=head,
                task_type=PEFT_TASKS[plan.task],
                prefix=checkpoint.body,
            )

    def resume(self, state: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])


@lru_cache(maxsize=1)
def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The places of all examples, as an epoch goes through them."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def is_regression(built: TaskModel) -> bool:
    return built.checkpoint.head is not None and built.checkpoint.head.problem_type == "regression"


def decaying(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases don't."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(plan: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to nothing."""
    rising = max(round(plan.warmup * steps), 1)
    return plan.learning_rate * min((step + 1) / rising, (steps - step) / max(steps - rising + 1, 1))


def line_of(told: dict[str, float]) -> str:
    names = {"trained": "loss", "loss": "held-out loss"}
    rest = [f"{names.get(name, name)} {value:.4g}" for name, value in told.items() if name not in ("step", "epoch")]
    return f"step {told['step']}, epoch {told['epoch']:.2f}: {', '.join(rest)}"
