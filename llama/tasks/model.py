"""TaskModel: a model with a task head and its tokenizer, built from a checkpoint's directory and written back to one.

Knows where things are; leaves the network to `heads`, what is read out of logits to `answering`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import parallel
from .._util.files import make_unfinished_directory
from .._util.validate import check_count
from ..adapters.lora import LoraLinear
from ..adapters.peft import load_adapter
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.convert import as_local_path, check_target, write
from ..checkpoints.fit import check_vocabulary, check_weights
from ..checkpoints.loader import fetch_checkpoint, load_model, open_checkpoint, resolve_sizes
from ..checkpoints.schema import Stored, shared_over, split_dim, tensor_shapes
from ..checkpoints.side_files import find_tokenizer
from ..checkpoints.task_spec import TAG_DROPOUT, TENSORS, HeadConfig, ProblemType, Task
from ..checkpoints.writing import allocate_on_disk
from ..errors import LlamaError, shorten, to_one_line
from ..model import Transformer
from ..tokenization.hf_tokenizer import open_tokenizer
from ..tokenization.protocol import AnyTokenizer
from .heads import CausalLM, Head, QuestionAnswerer, SequenceClassifier, TokenClassifier
from .predict import Answer, AnswerOptions, Label, answer, answer_all, classify, tag
from .spans import Span

HEADS: dict[Task, type[Head]] = {"classify": SequenceClassifier, "tag": TokenClassifier, "answer": QuestionAnswerer}


class TaskModel:
    """A task's head on a Transformer. On several ranks every rank calls the same methods with the same arguments."""

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        *,
        task: Task | None = None,
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        adapter_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "TaskModel":
        """Load a checkpoint directory on the ranks that run; most arguments as `Llama.build` has them.

        max_seq_len, max_batch_size: the longest text, and how many at a time. task: None takes the one that the
        checkpoint was made for. A task that it wasn't made for, or labels that aren't its own, get a new head, to be
        trained; "language" has none. labels: to "classify" or "tag". problem_type: to "classify"; None keeps the
        checkpoint's. adapter_dir: an adapter of peft's (see `adapter`), kept apart, with the head that it was trained
        with; what is saved has it merged. Raises LlamaError, on every rank, for whatever can't work.
        """
        place = parallel.initialize(model_parallel_size, device, None if dtype == "auto" else dtype)
        directory = fetch_checkpoint(ckpt_dir)
        with parallel.raise_together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            checkpoint = for_task(open_checkpoint(directory), task, labels, problem_type)
            args, place = resolve_sizes(checkpoint, place, max_seq_len, max_batch_size, dtype == "auto")
            tokenizer = open_tokenizer(tokenizer_path or find_tokenizer(checkpoint))
            check_vocabulary(args, tokenizer)
            check_weights(args, place, place.dtype.itemsize, "choose a smaller dtype")
        model = load_model(checkpoint, args, place)
        head = CausalLM(model) if checkpoint.head is None else HEADS[checkpoint.task](model, checkpoint.head)
        tensors = checkpoint.head_tensors
        if adapter_dir is not None:
            tensors = {**tensors, **load_adapter(model, adapter_dir)}
        with parallel.raise_together():
            fill(head, tensors, TENSORS[checkpoint.task], adapter_dir or checkpoint.directory)
        return TaskModel(head.eval(), tokenizer, checkpoint)

    def __init__(self, head: Head | CausalLM, tokenizer: AnyTokenizer, checkpoint: Checkpoint):
        """checkpoint: what it was built from, and what it is written as."""
        self.head = head
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint

    @property
    def task(self) -> Task:
        return self.checkpoint.task

    @property
    def model(self) -> Transformer:
        return self.head.model

    @property
    def _sizes(self) -> tuple[int, int]:
        """The longest text, and how many at a time."""
        return self.model.params.max_seq_len, self.model.params.max_batch_size

    def classify(self, texts: Sequence[str]) -> list[list[Label]]:
        """The labels of each text: see `answering.classify`."""
        return classify(self._made_for("classify"), self.tokenizer, texts, *self._sizes)

    def tag(self, texts: Sequence[str], *, whole_words: bool = True) -> list[list[Span]]:
        """The spans found in each text: see `answering.tag`."""
        return tag(self._made_for("tag"), self.tokenizer, texts, *self._sizes, whole_words=whole_words)

    def answer(self, question: str, context: str, **options: Unpack[AnswerOptions]) -> list[Answer]:
        """The best answers that the context gives, the best first: see `answering.answer_all`, options too."""
        return answer(self._made_for("answer"), self.tokenizer, question, context, *self._sizes, **options)

    def answer_all(self, pairs: Sequence[tuple[str, str]], **options: Unpack[AnswerOptions]) -> list[list[Answer]]:
        """The best answers to each (question, context): see `answering.answer_all`."""
        return answer_all(self._made_for("answer"), self.tokenizer, pairs, *self._sizes, **options)

    def _made_for(self, task: Task) -> Any:
        """The head, if it is one to do this. Raises LlamaError."""
        if self.task != task:
            raise LlamaError(f"{self.checkpoint.directory} has no head to {task} texts: build it with task={task!r}")
        return self.head

    def save(self, directory: str | Path, dtype: str | torch.dtype | None = None, force: bool = False) -> None:
        """Write it as transformers' class of the same task reads it, whole or not at all. Called on all ranks.

        dtype: of the tensors; None: that of the checkpoint it was built from. Raises LlamaError, on all ranks, for what
        can't be written, and where `directory` holds files, unless `force` lets the checkpoint there be replaced.
        """
        with parallel.long_timeout_group() as ranks:
            with parallel.raise_together(ranks), written(directory):
                kept = parallel.choose_dtype(dtype or self.checkpoint.dtype, torch.device("cpu"))
                target = as_local_path(directory)
                if parallel.is_main_process():
                    check_target(self.checkpoint, target, force)
                places = self._places(target) if parallel.is_main_process() and parallel.group().size() > 1 else {}
            tensors = gathered(self.model, places)
            with parallel.raise_together(ranks), written(directory):
                if parallel.is_main_process():
                    head = {name: self.head.get_parameter(name).data.cpu() for name in TENSORS[self.task]}
                    found = replace(self.checkpoint, tensors=tensors, head_tensors=head, quantization=None)
                    write(found, target, "hf", dtype=kept, force=force)

    def _places(self, target: Path) -> dict[str, list[Tensor]]:
        """Where all ranks' parts of each tensor go, in the order of the ranks: in files without names."""
        own, new = dict(self.model.named_parameters()), not target.exists()
        with make_unfinished_directory(target) as unfinished:
            places = {
                name: [
                    allocate_on_disk(unfinished, own[name].shape, own[name].dtype)
                    for _ in range(parallel.group().size())
                ]
                for name in tensor_shapes(self.model.params)
                if split_dim(name) is not None
            }
            unfinished.rmdir()
        if new:
            target.rmdir()
        return places


@contextlib.contextmanager
def written(directory: str | Path) -> Iterator[None]:
    """The system's errors in this context, as LlamaError."""
    try:
        yield
    except OSError as e:
        raise LlamaError(f"{directory} can't be written ({to_one_line(e)})") from e


def fill(head: nn.Module, tensors: Mapping[str, Tensor], names: Sequence[str], where: str | Path) -> None:
    """Give the head its tensors; one that is new has none. Raises LlamaError for others than its own."""
    if wrong := [name for name in tensors if name not in names]:
        raise LlamaError(
            f"{where} has {wrong[0]}, which is of another task's head: expected {', '.join(names) or 'none'}"
        )
    for name, tensor in tensors.items():
        own = head.get_parameter(name)
        if own.shape != tensor.shape:
            found, expected = tuple(tensor.shape), tuple(own.shape)
            raise LlamaError(
                f"{where}: {name} of shape {found}, expected {expected}: give the labels it was trained on"
            )
        own.data.copy_(tensor)


def for_task(
    checkpoint: Checkpoint, task: Task | None, labels: Sequence[str] | None, problem_type: ProblemType | None
) -> Checkpoint:
    """The checkpoint as one of this task, whose head is new where it has no such head. Raises LlamaError."""
    task = task or checkpoint.task
    if task not in TENSORS:
        raise LlamaError(f"task is {task!r}, expected one of {', '.join(TENSORS)}")
    if labels is not None and (task not in ("classify", "tag") or not isinstance(labels, list | tuple)):
        raise LlamaError(f"labels is {shorten(labels)}, expected a list of names to classify or tag by, or None")
    if problem_type is not None and task != "classify":
        raise LlamaError(f"problem_type is {problem_type!r}, expected None: the task is {task}, and not classify")
    if task == "language":
        if checkpoint.head is not None:
            raise LlamaError(f"{checkpoint.directory} has no output layer: it was made to {checkpoint.task} texts")
        return checkpoint
    own = checkpoint.head if checkpoint.task == task else None
    if own is not None and (labels is None or tuple(labels) == own.labels):
        return replace(checkpoint, head=replace(own, problem_type=problem_type or own.problem_type))
    if labels is None and task != "answer":
        raise LlamaError(f"{checkpoint.directory} has no head to {task} texts: give labels for a new one")
    config = HeadConfig(
        ("start", "end") if task == "answer" else tuple(labels or ()), problem_type, TAG_DROPOUT * (task == "tag")
    )
    args = replace(checkpoint.sizes, tied_embeddings=True)  # what stands for an output layer takes no room
    return replace(checkpoint, task=task, head=config, head_tensors={}, args=args)


def gathered(model: Transformer, places: dict[str, list[Tensor]]) -> dict[str, Stored]:
    """All tensors of the whole model, adapters added to them, on rank 0, whose `places` ranks' parts are put into."""
    ranks, found = parallel.group(), {}
    if dist.get_global_rank(ranks, 0) != 0:
        return {}  # a data-parallel copy
    for name in tensor_shapes(model.params):
        layer, dim = model.get_submodule(name.rpartition(".")[0]), split_dim(name)
        if isinstance(layer, LoraLinear) and name.endswith(".weight"):
            part = layer.matrix().detach().cpu()
        else:
            part = model.get_parameter(name).detach().cpu()
        if ranks.size() == 1 or dim is None:
            found[name] = Stored(name, (part,))
            continue
        dist.gather(part.contiguous(), places.get(name), 0, group=ranks)
        every = shared_over(name, model.params, ranks.size())  # of neighbours that hold the same, one
        found[name] = Stored(name, tuple(places.get(name, [part])[::every]), dim)
    return found
