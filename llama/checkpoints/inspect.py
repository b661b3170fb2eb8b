"""What a checkpoint's directory holds and all that is wrong with it: a `CheckpointReport`, as text or JSON.

Knows the result of a survey; reads no tensor and needs no process group.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._util.device import DTYPES, parse_dtype
from .._util.validate import check_count
from ..accelerate.quantization import BITS, GROUP, Quantization, bits_of
from ..errors import LlamaError, make_printable, pluralize
from ..model import ModelArgs
from ..tokenization.hf_tokenizer import open_tokenizer
from ..tokenizer import Tokenizer
from .checkpoint import Checkpoint
from .families import label_of
from .fit import check_ranks, check_vocabulary
from .formats import FORMATS
from .loader import survey
from .schema import memory_needed, mp_sizes, part_sizes
from .side_files import find_tokenizer
from .task_spec import SPECS, TaskName

KINDS = {"tiktoken": "a vocabulary of tiktoken's", "tokenizers": "a tokenizer.json"}
CHATS = {"llama3": "Llama 3's format", "template": "the model's own template", None: "no template"}
LISTED_MISFITS, LISTED_LABELS = 24, 8  # in the text; more are counted
TITLE_WIDTH = 12  # of the text's first column


@dataclass(frozen=True)
class File:
    """A file of tensors."""

    name: str
    bytes: int | None  # None: the file can't be read
    problem: str | None  # None: the file is whole


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer."""

    file: str
    kind: str  # a key of KINDS
    n_words: int
    stop_tokens: list[dict[str, Any]]  # each {"id": int, "name": str or None}
    chat: str | None  # a key of CHATS


@dataclass(frozen=True)
class Memory:
    """Bytes that weights and KV cache take."""

    mp_size: int
    max_seq_len: int
    max_batch_size: int
    dtype: str
    weights: int  # of one model-parallel rank
    kv_cache: int
    weights_in_all: int  # of all `mp_size` ranks
    kv_cache_in_all: int


@dataclass(frozen=True)
class CheckpointReport:
    """All that `inspect` says. What broken files leave unknown is None or empty.

    The fields are the keys of the JSON, which has "ok" before them.
    """

    directory: str  # where the files lie
    format: str  # a key of FORMATS: "meta" or "hf"
    family: str | None  # the published models that it is one of, for people
    task: TaskName  # "language", or the task of its head: "classify", "tag" or "answer"
    labels: list[str]  # of a head to classify or tag
    sizes: dict[str, Any] | None  # see `sizes_of`
    parameters: int | None  # how many numbers it has
    quantization: Quantization | None  # how matrices are quantized in the files; None: not at all
    dtypes: dict[str, int]  # name -> how many tensors have it
    files: list[File]
    tokenizer: Vocabulary | None
    memory: Memory | None
    mp_sizes: list[int]  # on how many ranks it runs
    problems: list[str]  # one line each, those of files too
    misfits: list[str]  # what is wrong with the tensors in whole files

    @property
    def ok(self) -> bool:
        """Whether there are neither problems nor misfits."""
        return not self.problems and not self.misfits

    def as_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def as_text(self) -> str:
        """Two columns. Control characters, which names of files may have, are replaced."""
        return "\n".join(f"{title:{TITLE_WIDTH}} {make_printable(text)}" for title, text in rows(self))


def inspect(directory: str | os.PathLike, **options: Any) -> CheckpointReport:
    """What lies in a checkpoint's directory, and what is wrong with it. Reads headers; options: of `report_on`."""
    return report_on(survey(directory), **options)


def report_on(
    checkpoint: Checkpoint,
    *,
    mp_size: int = 1,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    dtype: str | None = None,
) -> CheckpointReport:
    """Report on a checkpoint, its tokenizer, and the memory that it would take if it were built with these arguments.

    dtype: None is that of most tensors in the files, quantized ones aside. Raises LlamaError for values that no model
    can be built with.
    """
    for name, count in (("mp_size", mp_size), ("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        check_count(name, count)
    chosen = None if dtype is None else parse_dtype(dtype)
    args, head, problems = checkpoint.args, checkpoint.head, list(checkpoint.problems)
    dtypes = Counter(stored.dtype for stored in checkpoint.tensors.values())
    dtypes.update(tensor.dtype for tensor in checkpoint.head_tensors.values())
    plain = Counter(stored.dtype for name, stored in checkpoint.tensors.items() if name.endswith((".weight", ".bias")))
    chosen = chosen or next((dtype for dtype, _ in plain.most_common() if dtype in DTYPES.values()), None)
    memory = None
    if args is not None:
        try:
            check_ranks(checkpoint.directory, args, mp_size, checkpoint.group)
            if chosen is not None:
                built = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
                memory = memory_of(built, mp_size, chosen, checkpoint.quantization)
                if head is not None:  # a model with a head needs no KV cache
                    memory = replace(memory, kv_cache=0, kv_cache_in_all=0)
        except LlamaError as e:
            problems.append(str(e))
    vocabulary, tokenizer_problems = inspect_tokenizer(checkpoint)
    return CheckpointReport(
        directory=str(checkpoint.directory),
        format=checkpoint.format.name,
        family=None if args is None else label_of(args, checkpoint.family),
        task=checkpoint.task,
        labels=list(head.labels) if head is not None and SPECS[checkpoint.task].outputs is None else [],
        sizes=None if args is None else sizes_of(args, head is not None),
        parameters=None if args is None else sum(part_sizes(args, 1).values()) + head_size(checkpoint),
        quantization=checkpoint.quantization,
        dtypes={dtype_name(dtype): count for dtype, count in dtypes.most_common()},
        files=[File(path.name, bytes_of(path), checkpoint.faults.get(path)) for path in checkpoint.files],
        tokenizer=vocabulary,
        memory=memory,
        mp_sizes=[] if args is None else mp_sizes(args, checkpoint.group),
        problems=problems + tokenizer_problems,
        misfits=list(checkpoint.misfits),
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def memory_of(args: ModelArgs, mp_size: int, dtype: torch.dtype, quantization: Quantization | None) -> Memory:
    weights, cache = memory_needed(args, mp_size, dtype, bits_of(quantization))
    lengths = (args.max_seq_len, args.max_batch_size)
    return Memory(mp_size, *lengths, dtype_name(dtype), weights, cache, mp_size * weights, mp_size * cache)


def head_size(checkpoint: Checkpoint) -> int:
    """How many numbers the head has."""
    return sum(tensor.numel() for tensor in checkpoint.head_tensors.values())


def sizes_of(args: ModelArgs, has_head: bool = False) -> dict[str, Any]:
    """The sizes by their meaning, whatever fields a file has for them. What a model hasn't is None or False.

    has_head: there is a head instead of an output layer, so that none is tied.
    """
    names = ["vocab_size", "norm_eps", "rope_theta", "rope_scaling", "sliding_window", "sliding_layers"]
    names += ["qkv_bias", "wo_bias", "mlp_bias", "qk_norm"]
    values = asdict(args)
    return {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
        "head_dim": args.head_size,
        "hidden_dim": args.hidden_dim,
        **{name: values[name] for name in names},
        "tied_embeddings": args.tied_embeddings and not has_head,
    }


def inspect_tokenizer(checkpoint: Checkpoint) -> tuple[Vocabulary | None, list[str]]:
    """(the tokenizer beside the tensors, what is wrong with it)."""
    try:
        path = find_tokenizer(checkpoint)
        tokenizer = open_tokenizer(path)
    except LlamaError as e:
        return None, [str(e)]
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    stops = [{"id": token, "name": names.get(token)} for token in sorted(tokenizer.stop_tokens)]
    if isinstance(tokenizer, Tokenizer):
        vocabulary = Vocabulary(path.name, "tiktoken", tokenizer.n_words, stops, "llama3")
    else:
        chat = None if tokenizer.chat_template is None else "template"
        vocabulary = Vocabulary(path.name, "tokenizers", tokenizer.n_words, stops, chat)
    try:
        if checkpoint.args is not None:
            check_vocabulary(checkpoint.args, tokenizer)
    except LlamaError as e:
        return vocabulary, [f"{path}: {e}"]
    return vocabulary, []


# --- text -----------------------------------------------------------------------------------------------------------


def rows(report: CheckpointReport) -> Iterator[tuple[str, str]]:
    """(title, text) of each line. The lines after the first of a section have no title."""
    yield "directory", report.directory
    yield "format", FORMATS[report.format].label
    yield "family", report.family or "unknown"
    if SPECS[report.task].tensors:
        yield "task", report.task + abbreviate_labels(report.labels)
    if report.sizes is not None:
        yield from rows_of_sizes(report.sizes)
        yield "parameters", f"{report.parameters:,}"
    if report.quantization is not None:
        bits = BITS[report.quantization]
        yield "quantized", f"{report.quantization}: integers of {bits} bits, of which {GROUP[bits]} share a scale"
    tensors = [f"{count} of {dtype}" for dtype, count in report.dtypes.items()]
    yield "tensors", ", ".join(tensors) or "unknown"
    yield from add_title("files", rows_of_files(report))
    yield from rows_of_tokenizer(report.tokenizer)
    yield from add_title("memory", rows_of_memory(report.memory))
    yield "mp_size", ", ".join(map(str, report.mp_sizes)) or "unknown"
    yield from add_title("problems", rows_of_problems(report))


def abbreviate_labels(labels: list[str]) -> str:
    if not labels:
        return ""
    more = ", ..." * (len(labels) > LISTED_LABELS)
    return f", {pluralize(len(labels), 'label')}: {', '.join(labels[:LISTED_LABELS])}{more}"


def add_title(title: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip([title, *[""] * (len(lines) - 1)], lines, strict=True)


def rows_of_sizes(sizes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The sizes that every model has, and a line of what only some models have."""
    common = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
    yield "sizes", ", ".join(f"{name} {sizes[name]}" for name in common)
    scaling = sizes["rope_scaling"]
    if scaling is None:
        stretched = "no scaling"
    else:
        stretched = f"{scaling['type']} scaling by {scaling['factor']:g}"
        if scaling["type"] != "linear":
            stretched += f" from {scaling['original_max_position_embeddings']} positions"
    yield "rotary", f"theta {sizes['rope_theta']:.10g}, {stretched}"
    biased = [name for name in ("qkv", "wo", "mlp") if sizes[f"{name}_bias"]]
    besides = [f"{' and '.join(biased)} biases"] if biased else []
    besides += ["q/k norm"] if sizes["qk_norm"] else []
    besides += ["tied embeddings"] if sizes["tied_embeddings"] else []
    if sizes["sliding_window"] is not None:
        layers = sizes["sliding_layers"]
        of = "" if layers is None else f" in {len(layers)} of {sizes['n_layers']} layers"
        besides.append(f"window of {sizes['sliding_window']} positions{of}")
    if besides:
        yield "besides", ", ".join(besides)


def rows_of_files(report: CheckpointReport) -> list[str]:
    width = max((len(file.name) for file in report.files), default=0)
    lines = []
    for file in report.files:
        size = "none" if file.bytes is None else human(file.bytes)
        path = str(Path(report.directory) / file.name)  # a problem begins with it, and the line with the file's name
        problem = "ok" if file.problem is None else file.problem.removeprefix(path).lstrip(": ")
        lines.append(f"{file.name:{width}}  {size:>7}  {problem}")
    return lines or ["none"]


def rows_of_tokenizer(tokenizer: Vocabulary | None) -> Iterator[tuple[str, str]]:
    if tokenizer is None:
        yield "tokenizer", "unknown"
        return
    yield "tokenizer", f"{tokenizer.file}, {KINDS[tokenizer.kind]}, {tokenizer.n_words} words"
    stops = [f"{stop['id']} {stop['name'] or '(a word)'}" for stop in tokenizer.stop_tokens]
    yield "stop tokens", ", ".join(stops) or "none: answers end at their greatest length"
    yield "chat", CHATS[tokenizer.chat]


def rows_of_memory(memory: Memory | None) -> list[str]:
    if memory is None:
        return ["unknown"]
    owners = [("one rank", memory.weights, memory.kv_cache)]
    if memory.mp_size > 1:
        owners.append((f"all {memory.mp_size} ranks", memory.weights_in_all, memory.kv_cache_in_all))
    width = max(len(owner) for owner, *_ in owners)
    return [
        f"{memory.dtype}, mp_size {memory.mp_size}, max_seq_len {memory.max_seq_len}, "
        f"max_batch_size {memory.max_batch_size}:"
    ] + [
        f"{owner:{width}}  {human(weights):>7} weights + {human(cache):>7} KV cache = {human(weights + cache):>7}"
        for owner, weights, cache in owners
    ]


def rows_of_problems(report: CheckpointReport) -> list[str]:
    """A line for each problem that isn't shown beside its file."""
    shown = {file.problem for file in report.files if file.problem is not None}
    lines = [f"{len(shown)} of files, above"] if shown else []
    lines += [problem for problem in report.problems if problem not in shown]
    lines += report.misfits[:LISTED_MISFITS]
    if (more := len(report.misfits) - LISTED_MISFITS) > 0:
        lines.append(f"and {more} more tensors that don't fit")
    return lines or ["none"]


def human(size: int) -> str:
    """A number of bytes in three digits, with its unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * scale:
            value = size / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{size} B"
