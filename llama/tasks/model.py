"""TaskModel: a model with a task head and its tokenizer, built from a checkpoint's directory and saved to one.

Knows files, ranks and when an engine is made; the network is in `heads`, the predictions in `predict`, the tasks in
`registry`.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import parallel
from .._util.device import choose_dtype
from .._util.files import make_unfinished_directory, refuse_unwritable
from .._util.ranks import long_timeout_group
from .._util.validate import check_count
from ..accelerate.accelerator import find_place
from ..adapters.lora import LoraLinear
from ..adapters.merging import adapt
from ..adapters.opening import find_base
from ..adapters.peft import attach
from ..adapters.reading import read_adapter
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.convert import as_local_path, check_target, write
from ..checkpoints.fit import check_memory, check_vocabulary, check_weights
from ..checkpoints.loader import fetch_checkpoint, load_model, open_checkpoint, resolve_sizes
from ..checkpoints.schema import Stored, ranks_per_part, split_dim, tensor_shapes
from ..checkpoints.task_spec import SPECS, HeadConfig, ProblemType, TaskName
from ..checkpoints.tokenizer_of import open_tokenizer_of
from ..checkpoints.writing import allocate_on_disk
from ..engine.engine import Engine
from ..errors import LlamaError, shorten
from ..generation import PREFILL_CHUNK
from ..model import Transformer
from ..tokenization.chat_template import make_formatter
from ..tokenization.inputs import Text, TextOptions
from ..tokenization.protocol import AnyTokenizer
from .heads import CausalLM, Head
from .predict import Answer, AnswerOptions, Label, answer, answer_all, classify, tag
from .registry import find_task
from .spans import Span


class TaskModel:
    """A Transformer with a task head.

    Predictions may be made by several threads at once, and what is trained or edited between calls counts in the next
    one. On several ranks, every rank calls the same methods with the same arguments, from one thread.
    """

    head: Head | CausalLM
    tokenizer: AnyTokenizer
    checkpoint: Checkpoint  # what the model was built from, with the task and the head that it is saved with

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        *,
        task: TaskName | None = None,
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        adapter_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "TaskModel":
        """Load a checkpoint directory on the ranks that run. Arguments that aren't listed are those of `Llama.build`.

        max_seq_len, max_batch_size: the longest text in tokens, and the number of texts in a batch; and so the size of
        the KV cache, which takes memory only once texts are classified, tagged or searched for answers.
        task: None takes the checkpoint's. Another task than the checkpoint's, or other labels, get a new head, which
        has to be trained; "language" has no head.
        labels: the names of the classes, to "classify" or "tag". problem_type: to "classify"; None keeps the
        checkpoint's.
        adapter_dir: an adapter as peft writes it, with the head that it was trained with. A and B are kept apart from
        the weights, and merged in what `save` writes. Its directory may be ckpt_dir too, with the base that it names.
        Raises LlamaError, on every rank, for whatever can't work.
        """
        place = find_place(model_parallel_size, device, None if dtype == "auto" else dtype)
        ckpt_dir, adapter_dir = fetch_checkpoint(ckpt_dir), fetch_checkpoint(adapter_dir)
        today = parallel.broadcast_object(datetime.now())
        with parallel.raise_together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            ckpt_dir, adapter_dir = find_base(ckpt_dir, adapter_dir)
            checkpoint = source = set_task(open_checkpoint(ckpt_dir), task, labels, problem_type)
            if adapter_dir is not None:
                adapter = read_adapter(adapter_dir, checkpoint.sizes, checkpoint.family)
                checkpoint = adapt(checkpoint, adapter, merge=False)
                source = adapt(source, adapter, merge=False, dtype=None if dtype == "auto" else place.dtype)
            args, place = resolve_sizes(checkpoint, place, max_seq_len, max_batch_size, dtype == "auto")
            tokenizer = open_tokenizer_of(checkpoint, tokenizer_path)
            check_vocabulary(args, tokenizer)
            check_weights(args, place, place.dtype.itemsize, "choose a smaller dtype")
            if find_task(checkpoint.task).predict is not None:  # also to train: it is evaluated in between
                check_memory(args, place)
        model = load_model(source, args, place)
        create_head = find_task(checkpoint.task).head
        head = create_head(model) if checkpoint.head is None else create_head(model, checkpoint.head)
        tensors = checkpoint.head_tensors
        if adapter_dir is not None:
            attach(model, adapter)
            tensors = {**tensors, **adapter.extra}
        with parallel.raise_together():
            load_head(head, tensors, SPECS[checkpoint.task].tensors, adapter_dir or checkpoint.directory)
        return TaskModel(head.eval(), tokenizer, checkpoint, today=today)

    def __init__(
        self,
        head: Head | CausalLM,
        tokenizer: AnyTokenizer,
        checkpoint: Checkpoint,
        *,
        today: datetime | None = None,
    ):
        """today: the date that chat templates may write, the same on all ranks. None: now."""
        self.head = head
        self.tokenizer = tokenizer
        self.formatter = make_formatter(tokenizer, today or datetime.now())
        self.checkpoint = checkpoint
        self._engine: Engine | None = None
        self._lock = threading.Lock()  # guards `_engines`

    @property
    def task(self) -> TaskName:
        return self.checkpoint.task

    @property
    def model(self) -> Transformer:
        return self.head.model

    @property
    def engine(self) -> Engine:
        """What reads the texts of predictions. It takes memory when it reads."""
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self.model, self.tokenizer, 1, PREFILL_CHUNK, None)
            return self._engine

    def classify(self, texts: Sequence[Text], **options: Unpack[TextOptions]) -> list[list[Label]]:
        """The labels of each text or dialog: see `predict.classify`."""
        return classify(self.engine, self._get_head("classify"), texts, self.formatter, **options)

    def tag(self, texts: Sequence[str], *, whole_words: bool = True) -> list[list[Span]]:
        """The spans in each text: see `predict.tag`."""
        return tag(self.engine, self._get_head("tag"), texts, whole_words=whole_words)

    def answer(self, question: str, context: str, **options: Unpack[AnswerOptions]) -> list[Answer]:
        """The best answers in the context, the best first. Options and details: see `predict.answer_all`."""
        return answer(self.engine, self._get_head("answer"), question, context, **options)

    def answer_all(self, pairs: Sequence[tuple[str, str]], **options: Unpack[AnswerOptions]) -> list[list[Answer]]:
        """The best answers to each (question, context): see `predict.answer_all`."""
        return answer_all(self.engine, self._get_head("answer"), pairs, **options)

    def _get_head(self, task: TaskName) -> Any:
        """The head. Raises LlamaError if it is of another task."""
        if self.task != task:
            raise LlamaError(f"{self.checkpoint.directory} has no head to {task} texts: build it with task={task!r}")
        return self.head

    def save(self, directory: str | Path, dtype: str | torch.dtype | None = None, force: bool = False) -> None:
        """Write files that transformers' class of the same task reads, whole or not at all. Called on all ranks.

        dtype: of the tensors; None: the checkpoint's. force: replace a checkpoint in `directory`. Raises LlamaError, on
        all ranks, for what can't be written, and for a directory that holds files unless `force` is on.
        """
        with long_timeout_group() as ranks:
            with parallel.raise_together(ranks), refuse_unwritable(directory):
                saved_dtype = choose_dtype(dtype or self.checkpoint.dtype, torch.device("cpu"))
                target = as_local_path(directory)
                if parallel.is_main_process():
                    check_target(self.checkpoint, target, force)
                gathers = parallel.is_main_process() and parallel.group().size() > 1
                buffers = self._create_buffers(target) if gathers else {}
            tensors = gather_tensors(self.model, buffers)
            with parallel.raise_together(ranks), refuse_unwritable(directory):
                if parallel.is_main_process():
                    head = {name: self.head.get_parameter(name).data.cpu() for name in SPECS[self.task].tensors}
                    trained = replace(self.checkpoint, tensors=tensors, head_tensors=head, quantization=None)
                    write(trained, target, "hf", dtype=saved_dtype, force=force)

    def _create_buffers(self, target: Path) -> dict[str, list[Tensor]]:
        """Tensors in unnamed files on the target's disk, into which `gather_tensors` receives the parts of all ranks.

        The keys are the names of the tensors that ranks divide. Each has one buffer a rank, in the order of the ranks.
        """
        parameters, is_new = dict(self.model.named_parameters()), not target.exists()
        ranks = range(parallel.group().size())
        with make_unfinished_directory(target) as unfinished:
            buffers = {
                name: [allocate_on_disk(unfinished, parameters[name].shape, parameters[name].dtype) for _ in ranks]
                for name in tensor_shapes(self.model.params)
                if split_dim(name) is not None
            }
            unfinished.rmdir()
        if is_new:
            target.rmdir()
        return buffers


def load_head(head: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[str], where: str | Path) -> None:
    """Copy tensors into the head; for a new head there are none. names: of all tensors that the head may have.

    Raises LlamaError, naming `where` the tensors came from, if they are another head's.
    """
    if wrong := [name for name in tensors if name not in names]:
        raise LlamaError(
            f"{where} has {wrong[0]}, which is of another task's head: expected {', '.join(names) or 'none'}"
        )
    for name, tensor in tensors.items():
        parameter = head.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise LlamaError(
                f"{where}: {name} of shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}: give the labels "
                "it was trained on"
            )
        parameter.data.copy_(tensor)


def set_task(
    checkpoint: Checkpoint, task: TaskName | None, labels: Sequence[str] | None, problem_type: ProblemType | None
) -> Checkpoint:
    """The checkpoint with this task. Its head is new if the checkpoint's is of another task or has other labels.

    Arguments and errors as in `TaskModel.build`.
    """
    task = task or checkpoint.task
    spec = find_task(task).spec
    if labels is not None and (spec.outputs is not None or not isinstance(labels, list | tuple)):
        raise LlamaError(f"labels is {shorten(labels)}, expected a list of names to classify or tag by, or None")
    if problem_type is not None and not spec.has_problem_type:
        raise LlamaError(
            f"problem_type is {shorten(problem_type)}, expected None: the task is {task}, and not classify"
        )
    if not spec.tensors:
        if checkpoint.head is not None:
            raise LlamaError(f"{checkpoint.directory} has no output layer: it was made to {checkpoint.task} texts")
        if not checkpoint.has_output:
            raise LlamaError(f"{checkpoint.directory} has no output layer: it was saved to embed texts")
        return checkpoint
    head = checkpoint.head if checkpoint.task == task else None
    if head is not None and (labels is None or tuple(labels) == head.labels):
        return replace(checkpoint, head=replace(head, problem_type=problem_type or head.problem_type))
    outputs = labels if spec.outputs is None else spec.outputs
    if outputs is None:
        raise LlamaError(f"{checkpoint.directory} has no head to {task} texts: give labels for a new one")
    config = HeadConfig(tuple(outputs), problem_type, spec.dropout or 0.0)
    args = replace(checkpoint.sizes, tied_embeddings=True)  # without an output layer, which takes no memory then
    return replace(checkpoint, task=task, head=config, head_tensors={}, args=args)


def gather_tensors(model: Transformer, buffers: dict[str, list[Tensor]]) -> dict[str, Stored]:
    """All tensors of the whole model on rank 0, with adapters merged. Called on all ranks.

    buffers: on rank 0, where to put all ranks' parts of each tensor that ranks divide. Other ranks have none.
    """
    ranks, tensors = parallel.group(), {}
    if dist.get_global_rank(ranks, 0) != 0:
        return {}  # a data-parallel copy of the model
    for name in tensor_shapes(model.params):
        layer, dim = model.get_submodule(name.rpartition(".")[0]), split_dim(name)
        if isinstance(layer, LoraLinear):
            merged = layer.compute_weight() if name.endswith(".weight") else layer.compute_bias()
        else:
            merged = model.get_parameter(name)
        part = cast(Tensor, merged).detach().cpu()
        if ranks.size() == 1 or dim is None:
            tensors[name] = Stored(name, (part,))
            continue
        dist.gather(part.contiguous(), buffers.get(name), 0, group=ranks)
        step = ranks_per_part(name, model.params, ranks.size())  # so many neighbouring ranks have the same part
        tensors[name] = Stored(name, tuple(buffers.get(name, [part])[::step]), dim)
    return tensors
