"""What a checkpoint's directory holds and all that is wrong with it: a `CheckpointReport`.

Knows the result of a survey; reads no tensor and needs no process group.
"""

import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .._util.device import DTYPES, parse_dtype
from .._util.validate import check_count
from ..accelerate.quantization import Quantization, bits_of
from ..errors import LlamaError
from ..model import ModelArgs
from ..tokenization.chat_template import find_fault
from ..tokenizer import Tokenizer
from .checkpoint import Checkpoint
from .families import label_of
from .fit import check_ranks, check_vocabulary
from .loader import survey
from .recommended import read_recommended
from .report import CheckpointReport, File, Memory, Vocabulary
from .schema import memory_needed, mp_sizes, part_sizes
from .side_files import find_tokenizer
from .task_spec import SPECS
from .tokenizer_of import open_tokenizer_of
from .trained_length import describe_excess
from .vocabulary_problems import find_vocabulary_problems


def inspect(directory: str | os.PathLike, **options: Any) -> CheckpointReport:
    """What lies in a checkpoint's directory, and what is wrong with it. Reads headers; options: of `report_on`."""
    return report_on(survey(directory, argument="directory"), **options)


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
        adapter=None if checkpoint.adapter is None else str(checkpoint.adapter),
        format=checkpoint.format.name,
        family=None if args is None else label_of(args, checkpoint.family),
        task=checkpoint.task,
        labels=list(head.labels) if head is not None and SPECS[checkpoint.task].outputs is None else [],
        sizes=None if args is None else sizes_of(args, head is None and checkpoint.has_output),
        parameters=None if args is None else sum(part_sizes(args, 1).values()) + head_size(checkpoint),
        quantization=checkpoint.quantization,
        dtypes={dtype_name(dtype): count for dtype, count in dtypes.most_common()},
        files=[File(path.name, bytes_of(path), checkpoint.faults.get(path)) for path in checkpoint.files],
        has_output=checkpoint.has_output,
        tokenizer=vocabulary,
        memory=memory,
        mp_sizes=[] if args is None else mp_sizes(args, checkpoint.group),
        notes=[*checkpoint.notes, *filter(None, [describe_excess(checkpoint, max_seq_len)])],
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


def sizes_of(args: ModelArgs, has_output: bool = True) -> dict[str, Any]:
    """The sizes by their meaning, whatever fields a file has for them. What a model hasn't is None or False.

    has_output: False where there is no output layer, so that none is tied.
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
        "tied_embeddings": args.tied_embeddings and has_output,
    }


def inspect_tokenizer(checkpoint: Checkpoint) -> tuple[Vocabulary | None, list[str]]:
    """(the tokenizer beside the tensors, what is wrong with it)."""
    try:
        path = find_tokenizer(checkpoint)
        tokenizer = open_tokenizer_of(checkpoint)
    except LlamaError as e:
        return None, [str(e)]
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    stops = [{"id": token, "name": names.get(token)} for token in sorted(tokenizer.stop_tokens)]
    if isinstance(tokenizer, Tokenizer):
        vocabulary = Vocabulary(path.name, "tiktoken", tokenizer.n_words, stops, "llama3")
    else:
        chat = None if tokenizer.chat_template is None else "template"
        vocabulary = Vocabulary(path.name, "tokenizers", tokenizer.n_words, stops, chat)
    problems = [] if isinstance(tokenizer, Tokenizer) else find_vocabulary_problems(path)
    try:
        if checkpoint.args is not None:
            check_vocabulary(checkpoint.args, tokenizer)
        read_recommended(checkpoint)
    except LlamaError as e:
        problems.append(str(e) if str(e).startswith(str(path.parent)) else f"{path}: {e}")
    if vocabulary.chat == "template" and (fault := find_fault(tokenizer)):
        problems.append(f"{path}: {fault}")
    return vocabulary, problems
