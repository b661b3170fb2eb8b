"""Refuses requests that can't be answered, before any forward pass: prompts, counts and token ids that don't fit.

Each check raises LlamaError with the value and what was expected. Knows sizes and settings; knows no tensors.
"""

from collections.abc import Sequence
from numbers import Integral

from .. import parallel
from .._util.validate import check_count, check_list, is_integer
from ..errors import LlamaError, shorten
from ..model import ModelArgs
from ..settings import Settings
from .grammar import check_format
from .sequence import Sequence as TokenSequence


def check_room(prompt_tokens: Sequence[int], max_seq_len: int) -> None:
    """Check that an answer can follow a prompt that a person typed."""
    if len(prompt_tokens) >= max_seq_len:
        raise LlamaError(
            f"the text has {len(prompt_tokens)} tokens, which leaves no room for an answer within {max_seq_len}: "
            "shorten it, or build with a larger max_seq_len (--max_seq_len)"
        )


def check_speculation(lookup_ngram: object, speculate_k: object) -> None:
    check_count("speculate_k", speculate_k)
    if lookup_ngram is not None:
        check_count("lookup_ngram", lookup_ngram)


def check_best_of(best_of: int, n: int) -> None:
    check_count("best_of", best_of)
    if best_of < n:
        raise LlamaError(f"best_of is {best_of} and n is {n}: expected a best_of of at least n, to choose the n from")


def check_token_ids(settings: Sequence[Settings], top_logprobs: int, vocab_size: int) -> None:
    """Check that the token ids in settings, and the number of likeliest tokens, fit the vocabulary.

    And that a grammar can be made of each response format, on the rank that chooses tokens, which follows it.
    """
    if not is_integer(top_logprobs, 0) or top_logprobs > vocab_size:
        raise LlamaError(f"top_logprobs is {shorten(top_logprobs)}, expected a whole number in [0, {vocab_size}]")
    for s in settings:
        for name, tokens in (("logit_bias", s.logit_bias), ("stop_token_ids", s.stop_token_ids)):
            if too_large := [token for token in tokens if token >= vocab_size]:
                raise LlamaError(f"{name} has token {too_large[0]}, expected whole numbers in [0, {vocab_size})")
        if s.response_format is not None and s.is_constrained and parallel.is_group_leader():
            check_format(s.response_format)


def check_prompts(prompt_tokens: Sequence[Sequence[int]], params: ModelArgs) -> None:
    """Check that prompts fit the vocabulary and max_seq_len."""
    check_list("prompts", prompt_tokens)
    if len(prompt_tokens) == 0:
        raise LlamaError("no prompt was given: expected a list of at least one")
    for i, prompt in enumerate(prompt_tokens):
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise LlamaError(f"prompt {i} is a {type(prompt).__name__}, expected a list of token ids")
        if len(prompt) == 0:
            raise LlamaError(f"prompt {i} is empty: expected at least one token")
        if bad := [t for t in prompt if not isinstance(t, Integral) or not 0 <= int(t) < params.vocab_size]:
            raise LlamaError(
                f"prompt {i} has token {shorten(bad[0])}, expected whole numbers in [0, {params.vocab_size})"
            )
        if len(prompt) > params.max_seq_len:
            raise LlamaError(
                f"prompt {i} has {len(prompt)} tokens, but max_seq_len is {params.max_seq_len}: "
                "shorten it or build with a larger max_seq_len"
            )


def check_budget(
    prompt_tokens: Sequence[Sequence[int]], settings: Sequence[Settings], max_seq_len: int, cache_tokens: int
) -> None:
    """Check that each prompt fits the whole KV cache together with its longest answer."""
    for i, (prompt, own) in enumerate(zip(prompt_tokens, settings, strict=True)):
        room = max_seq_len - len(prompt)
        answer = room if own.max_gen_len is None else min(room, own.max_gen_len)
        if len(prompt) >= cache_tokens:
            raise LlamaError(
                f"prompt {i} has {len(prompt)} tokens, but the KV cache holds {cache_tokens} in all: shorten it, or "
                "build with a larger kv_cache_gb"
            )
        if len(prompt) + answer > cache_tokens:
            raise LlamaError(
                f"prompt {i} has {len(prompt)} tokens and may get {answer}, together {len(prompt) + answer}, but the "
                f"KV cache holds {cache_tokens} tokens in all: lower max_gen_len, or build with a larger kv_cache_gb"
            )


def check_texts_fit(sequences: Sequence[TokenSequence], cache_tokens: int) -> None:
    """Check that each text that is only read fits the whole KV cache."""
    for s in sequences:
        if s.position > cache_tokens:
            raise LlamaError(
                f"text {s.index} has {s.position} tokens, but the KV cache holds {cache_tokens} in all: shorten it, or "
                "build with a larger kv_cache_gb"
            )
