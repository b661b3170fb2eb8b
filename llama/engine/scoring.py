"""Texts through a model, without generating: how likely the model finds each text, and a vector for each text.

Texts run the longest first, as many at a time as the KV cache has slots. Knows an engine; knows no sampling.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from .. import parallel
from .._util.console import progress_bar
from .._util.validate import check_texts, is_integer
from ..errors import LlamaError, shorten
from ..model import Transformer
from ..tokenization.protocol import AnyTokenizer
from .engine import Engine
from .scheduler import compute_logprobs, prefill, run_passes

T = TypeVar("T")
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    tokens: list[int]  # with begin-of-text where the tokenizer puts one
    logprobs: list[float]  # natural, of each token after those before it; 0.0 for the first, which nothing predicts

    @property
    def logprob(self) -> float:
        """The logprob of the whole text: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob of the tokens that are predicted; nan where none is."""
        predicted = len(self.tokens) - 1
        return float(torch.tensor(-self.logprob / predicted, dtype=torch.float64).exp()) if predicted else math.nan


@dataclass(frozen=True)
class ScoringWindow:
    """Tokens `start` to `end` of a text, which are read together to score those from `first` on."""

    text: int  # the text's place in the list
    start: int
    end: int
    first: int


@torch.no_grad()
def score(engine: Engine, texts: Sequence[str], *, stride: int | None = None) -> list[Score]:
    """How likely the model finds each text, in the order of the texts.

    A text longer than max_seq_len is read in windows of that length, each `stride` tokens after the one before (None:
    half a window). A window scores the tokens that no earlier one has scored, as in
    https://huggingface.co/docs/transformers/perplexity. A smaller stride gives tokens more context, for more work.
    Takes the KV cache: a stream under way ends. Raises LlamaError, before any forward pass, for texts that aren't a
    list of strings of at least one character and for a stride outside [1, max_seq_len); after the passes for logprobs
    that aren't finite.
    """
    model, size = engine.model, engine.model.params.max_seq_len
    with parallel.raise_together(parallel.group()):
        stride = resolve_stride(stride, size)
        tokens = encode_texts(engine.tokenizer, texts)
    engine.runner.claim_cache()
    logprobs = [[0.0] * len(text) for text in tokens]
    windows = [window for i, text in enumerate(tokens) for window in split_windows(i, len(text), size, stride)]
    for batch in batch_by_length(windows, lambda w: w.end - w.start, model.params.max_batch_size, "scoring"):
        prompts = [tokens[window.text][window.start : window.end] for window in batch]
        firsts = [window.first - window.start for window in batch]
        for window, scored in zip(batch, score_prompts(model, prompts, firsts, engine.prefill_chunk), strict=True):
            logprobs[window.text][window.first : window.end] = scored
    for i, text_logprobs in enumerate(logprobs):
        if not all(map(math.isfinite, text_logprobs)):
            raise not_finite_error(i, "logprobs", model.dtype)
    return [Score(text, text_logprobs) for text, text_logprobs in zip(tokens, logprobs, strict=True)]


@torch.no_grad()
def embed(engine: Engine, texts: Sequence[str], pooling: Pooling = "last") -> Tensor:
    """A vector for each text, float32 (texts, dim) on the CPU, from the normed hidden states before the output layer.

    pooling: "last" takes the last token's state, "mean" the mean over all tokens, begin-of-text included.
    Takes the KV cache: a stream under way ends. Raises LlamaError, before any forward pass, for texts that aren't a
    list of strings of at least one character and at most max_seq_len tokens; after the passes for vectors that aren't
    finite.
    """
    model = engine.model
    with parallel.raise_together(parallel.group()):
        if pooling not in get_args(Pooling):
            raise LlamaError(f"pooling is {pooling!r}, expected {' or '.join(map(repr, get_args(Pooling)))}")
        tokens = encode_texts(engine.tokenizer, texts)
        check_lengths(tokens, model.params.max_seq_len)
    engine.runner.claim_cache()
    vectors = torch.empty(len(tokens), model.params.dim)
    pool = pool_last if pooling == "last" else pool_mean
    for batch in batch_by_length(
        range(len(tokens)), lambda i: len(tokens[i]), model.params.max_batch_size, "embedding"
    ):
        vectors[batch] = pool(model, [tokens[i] for i in batch], engine.prefill_chunk).float().cpu()
    for i in (~vectors.isfinite().all(dim=-1)).nonzero().flatten().tolist():
        raise not_finite_error(i, "hidden states", model.dtype)
    return vectors


# --- checks -----------------------------------------------------------------------------------------------------------


def encode_texts(tokenizer: AnyTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. Raises LlamaError for a text that is empty or has none."""
    check_texts(texts, "text")
    tokens = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    if [] in tokens:
        i = tokens.index([])
        raise LlamaError(f"text {i}, {shorten(texts[i])}, has no token: expected at least one")
    return tokens


def resolve_stride(stride: int | None, size: int) -> int:
    """The stride to use in windows of `size` tokens. Raises LlamaError."""
    if size < 2:
        raise LlamaError(f"max_seq_len is {size}, within which no token follows another: build with at least 2")
    if stride is None:
        return size // 2
    if not is_integer(stride, 1) or stride >= size:
        raise LlamaError(f"stride is {stride!r}, expected a whole number in [1, {size}), less than max_seq_len")
    return int(stride)


def check_lengths(tokens: Sequence[Sequence[int]], most: int) -> None:
    """Raise LlamaError for a text of more than `most` tokens."""
    for i, text in enumerate(tokens):
        if len(text) > most:
            raise LlamaError(
                f"text {i} has {len(text)} tokens, but max_seq_len is {most}: "
                "shorten it or build with a larger max_seq_len"
            )


def not_finite_error(text: int, what: str, dtype: torch.dtype) -> LlamaError:
    return LlamaError(
        f"text {text}: the {what} are not finite in {dtype}: the weights are damaged or this dtype "
        "overflows; try --dtype float32"
    )


# --- batches and passes -----------------------------------------------------------------------------------------------


def split_windows(text: int, length: int, size: int, stride: int) -> Iterator[ScoringWindow]:
    """Windows of at most `size` tokens, in order, that together score each of `length` tokens but the first once."""
    start, scored = 0, 1
    while scored < length:
        end = min(start + size, length)
        yield ScoringWindow(text, start, end, scored)
        start, scored = start + stride, end


def batch_by_length(items: Sequence[T], length: Callable[[T], int], size: int, label: str) -> Iterator[list[T]]:
    """Batches of `size` items, the longest first, under a progress bar with this label, which counts tokens."""
    items = sorted(items, key=length, reverse=True)
    with progress_bar(label, sum(map(length, items)), " tokens", delayed=True) as bar:
        for i in range(0, len(items), size):
            batch = items[i : i + size]
            yield batch
            bar.update(sum(map(length, batch)))


def score_prompts(
    model: Transformer, prompt_tokens: Sequence[Sequence[int]], firsts: Sequence[int], chunk: int
) -> list[list[float]]:
    """The logprobs of each prompt's tokens, from token firsts[i] of prompt i on. prompt_tokens: the longest first."""
    logprobs: list[list[float]] = [[] for _ in prompt_tokens]
    for one_pass, h in run_passes(model, prompt_tokens, chunk):
        for row, new in zip(logprobs, compute_logprobs(model, prompt_tokens, firsts, one_pass, h), strict=False):
            row += new
    return logprobs


def pool_last(model: Transformer, prompt_tokens: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """The hidden state of each prompt's last token: (B, dim). prompt_tokens: the longest first."""
    return prefill(model, prompt_tokens, chunk, logprobs=False)[0]


def pool_mean(model: Transformer, prompt_tokens: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """The mean of the hidden states of each prompt's tokens: float32 (B, dim). prompt_tokens: the longest first."""
    sums = torch.zeros(len(prompt_tokens), model.params.dim, device=model.device)
    for one_pass, h in run_passes(model, prompt_tokens, chunk):
        for row in range(one_pass.rows):
            states = h[row, : len(prompt_tokens[row]) - one_pass.start]  # (up to T, dim): without padding
            sums[row] += states.sum(dim=0, dtype=torch.float32)
    return sums / torch.tensor([[len(prompt)] for prompt in prompt_tokens], device=model.device)
