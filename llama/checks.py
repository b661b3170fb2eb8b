"""Refuses what can't work before anything runs: each check raises LlamaError with what was found and expected.

Knows numbers, sizes and vocabularies; reads no files and knows no tensors.
"""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from .errors import LlamaError
from .hf_tokenizer import HFTokenizer
from .layout import memory_needed, mp_sizes, part_sizes
from .model import ModelArgs
from .panels import Quantization
from .parallel import Place, available_memory
from .settings import Settings, is_whole
from .tokenizer import Tokenizer


def check_count(name: str, value: Any) -> None:
    if not is_whole(value, 1):
        raise LlamaError(f"{name} is {value!r}, expected a whole number of at least 1")


def check_seed(seed: object) -> None:
    if not is_whole(seed):
        raise LlamaError(f"seed is {seed!r}, expected a whole number")


def check_room(prompt_tokens: Sequence[int], max_seq_len: int) -> None:
    """For one prompt of a person's: whether an answer can follow it."""
    if len(prompt_tokens) >= max_seq_len:
        raise LlamaError(
            f"the text has {len(prompt_tokens)} tokens, which leaves no room for an answer within {max_seq_len}: "
            "shorten it, or start with a larger --max_seq_len"
        )


def check_draft(directory: str | Path, vocab_size: int, expected: int) -> None:
    if vocab_size != expected:
        raise LlamaError(
            f"{directory} has vocab_size {vocab_size} and the model {expected}: a draft must have the same vocabulary"
        )


def check_speculation(lookup_ngram: object, speculate_k: object) -> None:
    check_count("speculate_k", speculate_k)
    if lookup_ngram is not None:
        check_count("lookup_ngram", lookup_ngram)


def check_best_of(best_of: int, n: int) -> None:
    check_count("best_of", best_of)
    if best_of < n:
        raise LlamaError(f"best_of is {best_of} and n is {n}: no more answers can be given than are made")


def check_token_ids(settings: Sequence[Settings], top_logprobs: int, vocab_size: int) -> None:
    """Whether what names tokens, or a number of them, fits the vocabulary."""
    if not is_whole(top_logprobs, 0) or top_logprobs > vocab_size:
        raise LlamaError(f"top_logprobs is {top_logprobs!r}, expected a whole number in [0, {vocab_size}]")
    for one in settings:
        for name, tokens in (("logit_bias", one.logit_bias), ("stop_token_ids", one.stop_token_ids)):
            if bad := [token for token in tokens if token >= vocab_size]:
                raise LlamaError(f"{name} has token {bad[0]}, expected whole numbers in [0, {vocab_size})")


def check_list(name: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        raise LlamaError(f"{name} is a {type(value).__name__}, expected a list of one for each row of the batch")


def check_texts(texts: Sequence[str], name: str = "prompt") -> None:
    """name: what the caller calls one of them."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        found = repr(texts)
        raise LlamaError(f"{name}s is {found[:60]}{'...' * (len(found) > 60)}, expected a list of strings")
    if "" in texts:
        raise LlamaError(f"{name} {list(texts).index('')} is empty: give it at least one character")


def check_prompts(prompt_tokens: Sequence[Sequence[int]], params: ModelArgs, n: int = 1) -> None:
    """Whether a batch of token ids, with n rows to each, fits the vocabulary and the KV cache."""
    check_list("prompts", prompt_tokens)
    if len(prompt_tokens) == 0:
        raise LlamaError("no prompt was given: expected a list of at least one")
    if len(prompt_tokens) * n > params.max_batch_size:
        found = f"prompts x n={n} were asked for" if n > 1 else "prompts were given"
        raise LlamaError(
            f"{len(prompt_tokens)} {found}, but max_batch_size is {params.max_batch_size}: "
            "build with a larger max_batch_size or pass fewer at a time"
        )
    for i, prompt in enumerate(prompt_tokens):
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise LlamaError(f"prompt {i} is a {type(prompt).__name__}, expected a list of token ids")
        if len(prompt) == 0:
            raise LlamaError(f"prompt {i} is empty: expected at least one token")
        if bad := [t for t in prompt if not isinstance(t, Integral) or not 0 <= int(t) < params.vocab_size]:
            raise LlamaError(f"prompt {i} has token {bad[0]!r}, expected whole numbers in [0, {params.vocab_size})")
        if len(prompt) > params.max_seq_len:
            raise LlamaError(
                f"prompt {i} has {len(prompt)} tokens, but max_seq_len is {params.max_seq_len}: "
                "shorten it or build with a larger max_seq_len"
            )


def check_vocabulary(args: ModelArgs, tokenizer: Tokenizer | HFTokenizer) -> None:
    """Whether the tokenizer is this model's. Hugging Face's models may have more words, as padding; Meta's don't."""
    padded = isinstance(tokenizer, HFTokenizer) and args.vocab_size > tokenizer.n_words
    if args.vocab_size != tokenizer.n_words and not padded:
        raise LlamaError(
            f"the model has vocab_size {args.vocab_size} and the tokenizer {tokenizer.n_words} words: "
            "is its file whole? Otherwise pass the tokenizer_path that belongs to this checkpoint"
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
