"""What a model makes of texts that are there already: how likely it finds them, and the vectors it has for them.

Any number of texts: the longest go first, as many at a time as the KV cache has rows. Knows the model and the tokenizer
of a `Llama`; knows no sampling.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor

from .. import parallel
from .._util.console import progress_bar
from .._util.validate import check_texts, is_integer
from ..errors import LlamaError, shortened
from ..model import Transformer
from ..tokenization.hf_tokenizer import HFTokenizer
from ..tokenizer import Tokenizer
from .scheduler import logprobs_within, prefill, walk

if TYPE_CHECKING:
    from ..generation import Llama

T = TypeVar("T")
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    tokens: ids, with begin-of-text where the tokenizer puts one. logprobs: of each token after those before it, natural
    logarithms; 0.0 for the first, which nothing predicts.
    """

    tokens: list[int]
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        """Of the whole text: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob of the tokens that are predicted; nan where none is."""
        predicted = len(self.tokens) - 1
        return float(torch.tensor(-self.logprob / predicted, dtype=torch.float64).exp()) if predicted else math.nan


@dataclass(frozen=True)
class ScoringWindow:
    """Tokens `start` to `end` of a text, of which those from `first` on are scored here."""

    text: int
    start: int
    end: int
    first: int


@torch.no_grad()
def score(llama: "Llama", texts: Sequence[str], *, stride: int | None = None) -> list[Score]:
    """How likely the model finds each text, in the order of the texts.

    A text longer than max_seq_len is read in windows of that length, each `stride` tokens after the one before (None:
    half a window); a window scores what no earlier one has, as https://huggingface.co/docs/transformers/perplexity has
    it. A smaller stride gives tokens more context, for more work.
    Takes the KV cache: a stream under way is over. Raises LlamaError, before any forward pass, for what isn't a list of
    texts of at least one character each, or a stride outside [1, max_seq_len); after them for logprobs that aren't
    finite.
    """
    size = llama.model.params.max_seq_len
    with parallel.together(parallel.group()):
        stride = checked_stride(stride, size)
        tokens = encoded(llama.tokenizer, texts)
    model, chunk = with_the_cache(llama)
    found = [[0.0] * len(text) for text in tokens]
    places = [window for i, text in enumerate(tokens) for window in windows(i, len(text), size, stride)]
    for batch in batches(places, lambda window: window.end - window.start, model.params.max_batch_size, "scoring"):
        rows = [tokens[window.text][window.start : window.end] for window in batch]
        chances = logprobs_of(model, rows, [window.first - window.start for window in batch], chunk)
        for window, known in zip(batch, chances, strict=True):
            found[window.text][window.first : window.end] = known
    for i, known in enumerate(found):
        if not all(map(math.isfinite, known)):
            raise not_finite(i, "logprobs", model.dtype)
    return [Score(text, known) for text, known in zip(tokens, found, strict=True)]


@torch.no_grad()
def embed(llama: "Llama", texts: Sequence[str], pooling: Pooling = "last") -> Tensor:
    """A vector for each text, float32 (texts, dim) on the CPU: of the hidden states before the output layer, normed.

    pooling: "last" takes the last token's, "mean" the mean over all tokens, begin-of-text included.
    Takes the KV cache: a stream under way is over. Raises LlamaError, before any forward pass, for what isn't a list of
    texts of at least one character and at most max_seq_len tokens each; after them for vectors that aren't finite.
    """
    with parallel.together(parallel.group()):
        if pooling not in get_args(Pooling):
            raise LlamaError(f"pooling is {pooling!r}, expected {' or '.join(map(repr, get_args(Pooling)))}")
        tokens = encoded(llama.tokenizer, texts)
        check_lengths(tokens, llama.model.params.max_seq_len)
    model, chunk = with_the_cache(llama)
    found = torch.empty(len(tokens), model.params.dim)
    pool = last_states if pooling == "last" else mean_states
    for batch in batches(range(len(tokens)), lambda i: len(tokens[i]), model.params.max_batch_size, "embedding"):
        found[batch] = pool(model, [tokens[i] for i in batch], chunk).float().cpu()
    for i in (~found.isfinite().all(dim=-1)).nonzero().flatten().tolist():
        raise not_finite(i, "hidden states", model.dtype)
    return found


# --- what is checked ------------------------------------------------------------------------------------------------


def encoded(tokenizer: Tokenizer | HFTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. Raises LlamaError for what has none."""
    check_texts(texts, "text")
    tokens = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    if [] in tokens:
        i = tokens.index([])
        raise LlamaError(f"text {i}, {shortened(texts[i])}, has no token: expected at least one")
    return tokens


def checked_stride(stride: int | None, size: int) -> int:
    if size < 2:
        raise LlamaError(f"max_seq_len is {size}, within which no token follows another: build with at least 2")
    if stride is None:
        return size // 2
    if not is_integer(stride, 1) or stride >= size:
        raise LlamaError(f"stride is {stride!r}, expected a whole number in [1, {size}), less than max_seq_len")
    return int(stride)


def check_lengths(tokens: Sequence[Sequence[int]], most: int) -> None:
    for i, text in enumerate(tokens):
        if len(text) > most:
            raise LlamaError(
                f"text {i} has {len(text)} tokens, but max_seq_len is {most}: "
                "shorten it or build with a larger max_seq_len"
            )


def not_finite(text: int, what: str, dtype: torch.dtype) -> LlamaError:
    return LlamaError(
        f"text {text}: the {what} are not finite in {dtype}: the weights are damaged or this dtype "
        "overflows; try --dtype float32"
    )


# --- how it is done -------------------------------------------------------------------------------------------------


def with_the_cache(llama: "Llama") -> tuple[Transformer, int]:
    """The model, whose KV cache no stream relies on any more, and the tokens that a pass of it takes."""
    llama.engine.take_cache()
    return llama.model, llama.engine.prefill_chunk


def windows(text: int, length: int, size: int, stride: int) -> Iterator[ScoringWindow]:
    """Windows of at most `size` tokens that score all but the first of `length` once, in their order."""
    start, scored = 0, 1
    while scored < length:
        end = min(start + size, length)
        yield ScoringWindow(text, start, end, scored)
        start, scored = start + stride, end


def batches(items: Sequence[T], length: Callable[[T], int], size: int, doing: str) -> Iterator[list[T]]:
    """All items, the longest first, so many at a time. A terminal shows how many tokens went by."""
    items = sorted(items, key=length, reverse=True)
    with progress_bar(doing, sum(map(length, items)), " tokens", delayed=True) as bar:
        for i in range(0, len(items), size):
            batch = items[i : i + size]
            yield batch
            bar.update(sum(map(length, batch)))


def logprobs_of(
    model: Transformer, rows: Sequence[Sequence[int]], firsts: Sequence[int], chunk: int
) -> list[list[float]]:
    """Of rows, the longest first, the logprobs of the tokens from each one's first to be scored on."""
    found: list[list[float]] = [[] for _ in rows]
    for step, h in walk(model, rows, chunk):
        for known, more in zip(found, logprobs_within(model, rows, firsts, step, h), strict=False):
            known += more
    return found


def last_states(model: Transformer, rows: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Hidden states of the last tokens of rows, the longest first: (B, dim)."""
    return prefill(model, rows, chunk, logprobs=False)[0]


def mean_states(model: Transformer, rows: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """The mean of the hidden states of each row's tokens, the longest first: float32 (B, dim)."""
    device = model.device
    sums = torch.zeros(len(rows), model.params.dim, device=device)
    for step, h in walk(model, rows, chunk):
        for row in range(step.rows):
            own = h[row, : len(rows[row]) - step.start]  # (up to T, dim): what isn't padding
            sums[row] += own.sum(dim=0, dtype=torch.float32)
    return sums / torch.tensor([[len(row)] for row in rows], device=device)
