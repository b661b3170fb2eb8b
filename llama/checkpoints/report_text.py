"""A `CheckpointReport` as lines of text in two columns.

Knows the report; looks at nothing itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accelerate.quantization import BITS, GROUP
from ..errors import pluralize
from .formats import FORMATS
from .task_spec import SPECS

if TYPE_CHECKING:
    from .report import CheckpointReport, Memory, Vocabulary

KINDS = {"tiktoken": "a vocabulary of tiktoken's", "tokenizers": "a tokenizer.json"}
CHATS = {"llama3": "Llama 3's format", "template": "the model's own template", None: "no template"}
LISTED_MISFITS, LISTED_LABELS = 24, 8  # in the text; more are counted
TITLE_WIDTH = 12  # of the text's first column


def rows(report: "CheckpointReport") -> Iterator[tuple[str, str]]:
    """(title, text) of each line. The lines after the first of a section have no title."""
    yield "directory", report.directory
    if report.adapter is not None:
        yield "adapter", report.adapter
    yield "format", FORMATS[report.format].label
    yield "family", report.family or "unknown"
    if SPECS[report.task].tensors:
        yield "task", report.task + abbreviate_labels(report.labels)
    if report.sizes is not None:
        yield from rows_of_sizes(report.sizes, report.has_output)
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
    if report.notes:
        yield from add_title("notes", report.notes)
    yield from add_title("problems", rows_of_problems(report))


def abbreviate_labels(labels: list[str]) -> str:
    if not labels:
        return ""
    more = ", ..." * (len(labels) > LISTED_LABELS)
    return f", {pluralize(len(labels), 'label')}: {', '.join(labels[:LISTED_LABELS])}{more}"


def add_title(title: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip([title, *[""] * (len(lines) - 1)], lines, strict=True)


def rows_of_sizes(sizes: dict[str, Any], has_output: bool) -> Iterator[tuple[str, str]]:
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
    besides += [] if has_output else ["no output layer: it only embeds texts"]
    if sizes["sliding_window"] is not None:
        layers = sizes["sliding_layers"]
        of = "" if layers is None else f" in {len(layers)} of {sizes['n_layers']} layers"
        besides.append(f"window of {sizes['sliding_window']} positions{of}")
    if besides:
        yield "besides", ", ".join(besides)


def rows_of_files(report: "CheckpointReport") -> list[str]:
    width = max((len(file.name) for file in report.files), default=0)
    lines = []
    for file in report.files:
        size = "none" if file.bytes is None else human(file.bytes)
        path = str(Path(report.directory) / file.name)  # a problem begins with it, and the line with the file's name
        problem = "ok" if file.problem is None else file.problem.removeprefix(path).lstrip(": ")
        lines.append(f"{file.name:{width}}  {size:>7}  {problem}")
    return lines or ["none"]


def rows_of_tokenizer(tokenizer: "Vocabulary | None") -> Iterator[tuple[str, str]]:
    if tokenizer is None:
        yield "tokenizer", "unknown"
        return
    yield "tokenizer", f"{tokenizer.file}, {KINDS[tokenizer.kind]}, {tokenizer.n_words} words"
    stops = [f"{stop['id']} {stop['name'] or '(a word)'}" for stop in tokenizer.stop_tokens]
    yield "stop tokens", ", ".join(stops) or "none: answers end at their greatest length"
    yield "chat", CHATS[tokenizer.chat]


def rows_of_memory(memory: "Memory | None") -> list[str]:
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


def rows_of_problems(report: "CheckpointReport") -> list[str]:
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
