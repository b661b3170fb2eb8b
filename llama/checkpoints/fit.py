"""Checks that a checkpoint's model fits its tokenizer, the ranks that run it, and their memory.

Each raises LlamaError with the numbers, before a tensor is loaded. Knows sizes; reads no files.
"""

from pathlib import Path

from .._util.device import available_memory
from ..accelerate.quantization import Quantization
from ..errors import LlamaError, shorten
from ..model import ModelArgs
from ..parallel import Place
from ..tokenization.hf_tokenizer import HFTokenizer
from ..tokenization.protocol import AnyTokenizer
from .schema import memory_needed, mp_sizes, part_sizes


def check_vocabulary(args: ModelArgs, tokenizer: AnyTokenizer) -> None:
    """Check that the tokenizer is this model's.

    A model of Hugging Face's may have more words than it, as padding. Its tokenizer may have more added tokens than the
    model knows: whoever uses one is refused by the tokenizer. What it puts before every text can't be such a token.
    """
    fits = args.vocab_size == tokenizer.n_words
    if isinstance(tokenizer, HFTokenizer):
        used = max(tokenizer.n_vocabulary - 1, *tokenizer.around_text.before, *tokenizer.around_text.after, 0)
        fits = used < args.vocab_size
    if not fits:
        raise LlamaError(
            f"the model has vocab_size {args.vocab_size} and the tokenizer {tokenizer.n_words} words: "
            "is its file whole? Otherwise pass the tokenizer_path that belongs to this checkpoint"
        )


def check_draft(directory: str | Path, vocab_size: int, expected: int) -> None:
    """Check the vocab_size of a draft model, which lies in `directory`."""
    if vocab_size != expected:
        raise LlamaError(
            f"{directory} has vocab_size {vocab_size} and the model {expected}: a draft must have the same vocabulary"
        )


def check_ranks(directory: Path, args: ModelArgs, mp_size: int, group: int = 1) -> None:
    """Check that a model of these sizes runs on so many ranks; the message says on how many it does.

    group: how many neighbouring numbers of a row share a scale, so that ranks can't divide them.
    """
    fitting = mp_sizes(args, group)
    if mp_size not in fitting:
        raise LlamaError(
            f"{directory} can't be divided over {mp_size} model-parallel ranks (n_heads {args.n_heads}, "
            f"n_kv_heads {args.kv_heads}, hidden_dim {args.hidden_dim}, vocab_size {args.vocab_size}"
            f"{f'; quantized in groups of {group}' * (group > 1)}): "
            f"start with torchrun --nproc_per_node {' or '.join(map(str, fitting))}"
        )


def choose_quantization(
    directory: Path, stored: Quantization | None, requested: Quantization | None
) -> Quantization | None:
    """How matrices are quantized in memory: as in the files, or else as requested."""
    if stored is not None and requested not in (None, stored):
        raise LlamaError(
            f"{directory} holds matrices quantized to {stored}, but quantization is {shorten(requested)}: leave it "
            "out, or take the checkpoint that this one was made of"
        )
    return stored or requested


def check_memory(
    args: ModelArgs, place: Place, bits: float | None = None, draft_bytes: int = 0, cache_bytes: int | None = None
) -> None:
    """Check that weights and KV cache fit: on a GPU those of one rank, on the CPU those of all ranks together.

    bits: per number of a quantized matrix, with its share of the scales; None: matrices aren't quantized.
    draft_bytes: what a draft model takes. cache_bytes: of the KV cache; None: room for all rows at full length.
    """
    weights, cache = memory_needed(args, place.mp_size, place.dtype, bits)
    full = f"max_batch_size={args.max_batch_size} x max_seq_len={args.max_seq_len}"
    cache, size = (cache, full) if cache_bytes is None else (cache_bytes, "kv_cache_gb")
    draft = f" + {draft_bytes / 1e9:.2f} GB of the draft model" if draft_bytes else ""
    check_fits(
        weights + cache + draft_bytes,
        place,
        f"{weights / 1e9:.2f} GB of weights + {cache / 1e9:.2f} GB of KV cache ({size}){draft} in {place.dtype}",
        "lower max_seq_len or max_batch_size" if cache_bytes is None else "lower kv_cache_gb",
    )


def check_weights(args: ModelArgs, place: Place, number_bytes: int, advice: str) -> None:
    """As `check_memory`, of a model without a KV cache.

    number_bytes: per number of the weights, with what training adds. advice: for the message.
    """
    numbers = sum(part_sizes(args, place.mp_size).values())
    what = f"{numbers / 1e9:.2f} billion numbers of {number_bytes} bytes each"
    check_fits(numbers * number_bytes, place, what, advice)


def check_fits(needed: int, place: Place, what: str, advice: str) -> None:
    """Check that `needed` bytes a rank are available. what, advice: for the message."""
    ranks = 1 if place.device.type == "cuda" else place.world_size
    available = available_memory(place.device)
    if ranks * needed > available:
        raise LlamaError(
            f"{what}, {ranks} x on {place.device} = {ranks * needed / 1e9:.2f} GB do not fit its "
            f"{available / 1e9:.2f} GB: "
            f"{advice}, or use more ranks"
        )
