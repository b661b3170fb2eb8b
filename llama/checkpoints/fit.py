"""Whether a checkpoint's model fits: its tokenizer, the ranks that run it, the memory that is there.

Each check raises LlamaError with the arithmetic, before a tensor is loaded. Knows sizes; reads no files.
"""

from pathlib import Path

from ..accelerate.quantization import Quantization
from ..errors import LlamaError
from ..model import ModelArgs
from ..parallel import Place, available_memory
from ..tokenization.hf_tokenizer import HFTokenizer
from ..tokenizer import Tokenizer
from .schema import memory_needed, mp_sizes, part_sizes


def check_vocabulary(args: ModelArgs, tokenizer: Tokenizer | HFTokenizer) -> None:
    """Whether the tokenizer is this model's. Hugging Face's models may have more words, as padding; Meta's don't."""
    padded = isinstance(tokenizer, HFTokenizer) and args.vocab_size > tokenizer.n_words
    if args.vocab_size != tokenizer.n_words and not padded:
        raise LlamaError(
            f"the model has vocab_size {args.vocab_size} and the tokenizer {tokenizer.n_words} words: "
            "is its file whole? Otherwise pass the tokenizer_path that belongs to this checkpoint"
        )


def check_draft(directory: str | Path, vocab_size: int, expected: int) -> None:
    if vocab_size != expected:
        raise LlamaError(
            f"{directory} has vocab_size {vocab_size} and the model {expected}: a draft must have the same vocabulary"
        )


def check_ranks(directory: Path, args: ModelArgs, mp_size: int, group: int = 1) -> None:
    """Whether a model of these sizes runs on so many ranks; says on how many it does.

    group: how many numbers of a row were rounded together, and so can't be divided.
    """
    fitting = mp_sizes(args, group)
    if mp_size not in fitting:
        raise LlamaError(
            f"{directory} can't be divided over {mp_size} model-parallel ranks (n_heads {args.n_heads}, "
            f"n_kv_heads {args.kv_heads}, hidden_dim {args.hidden_dim}, vocab_size {args.vocab_size}"
            f"{f'; rounded in groups of {group}' * (group > 1)}): "
            f"start with torchrun --nproc_per_node {' or '.join(map(str, fitting))}"
        )


def agreed_quantization(
    directory: Path, stored: Quantization | None, asked: Quantization | None
) -> Quantization | None:
    """How matrices are rounded in memory: as they are stored, else as was asked for."""
    if stored is not None and asked not in (None, stored):
        raise LlamaError(
            f"{directory} holds matrices rounded to {stored}, but quantization is {asked!r}: leave it out, or take the "
            "checkpoint that this one was made of"
        )
    return stored or asked


def check_memory(args: ModelArgs, place: Place, bits: float | None = None, beside: int = 0) -> None:
    """Refuse, with the arithmetic, what can't fit: on a GPU a rank's share, on the CPU that of all ranks together.

    bits: of a number of the matrices, where they are rounded. beside: bytes of a draft model.
    """
    weights, cache = memory_needed(args, place.mp_size, place.dtype, bits)
    draft = f" + {beside / 1e9:.2f} GB of the draft model" if beside else ""
    check_fits(
        weights + cache + beside,
        place,
        f"{weights / 1e9:.2f} GB of weights + {cache / 1e9:.2f} GB of KV cache (max_batch_size={args.max_batch_size} x "
        f"max_seq_len={args.max_seq_len}){draft} in {place.dtype}",
        "lower max_seq_len or max_batch_size",
    )


def check_weights(args: ModelArgs, place: Place, each: int, advice: str) -> None:
    """As `check_memory`, of a model without a KV cache that takes `each` bytes of every number."""
    numbers = sum(part_sizes(args, place.mp_size).values())
    check_fits(numbers * each, place, f"{numbers / 1e9:.2f} billion numbers of {each} bytes each", advice)


def check_fits(needed: int, place: Place, what: str, advice: str) -> None:
    """needed: bytes of one rank."""
    ranks = 1 if place.device.type == "cuda" else place.world_size
    have = available_memory(place.device)
    if ranks * needed > have:
        raise LlamaError(
            f"{what}, {ranks} x on {place.device} = {ranks * needed / 1e9:.2f} GB do not fit its {have / 1e9:.2f} GB: "
            f"{advice}, or use more ranks"
        )
