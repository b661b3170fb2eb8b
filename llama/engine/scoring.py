"""Texts through a model, without generating: how likely the model finds each text, and a vector for each text.

Texts are read the longest first. Knows an engine; knows no sampling.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, cast, get_args

import torch
from torch import Tensor

from .._util.console import progress_bar
from .._util.validate import is_integer
from ..errors import LlamaError, shorten
from ..tokenization.inputs import Text, TextOptions, encode_inputs
from ..tokenization.protocol import AnyChatFormat
from .ending import Ending
from .engine import Engine
from .not_finite import not_finite_error
from .sequence import Consume
from .sequence import Sequence as TokenSequence

Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    tokens: list[int]  # with begin-of-text and end-of-text where the tokenizer puts them
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


class ScoringOptions(TextOptions, total=False):
    """The keyword arguments of `score`, as `Llama.score` passes them on."""

    stride: int | None


@dataclass(frozen=True)
class ScoringWindow:
    """Tokens `start` to `end` of a text, which are read together to score those from `first` on."""

    text: int  # the text's place in the list
    start: int
    end: int
    first: int


@torch.no_grad()
def score(
    engine: Engine,
    texts: Sequence[Text],
    formatter: AnyChatFormat | None = None,
    *,
    stride: int | None = None,
    **options: Unpack[TextOptions],
) -> list[Score]:
    """How likely the model finds each text, in the order of the texts.

    A text has the tokens that its tokenizer puts around it. Instead of a text there may be a dialog, which `formatter`
    writes, up to its last message. allowed_special: names of control tokens that become tokens in texts.

    A text longer than max_seq_len is read in windows of that length, each `stride` tokens after the one before (None:
    half a window). A window scores the tokens that no earlier one has scored, as in
    https://huggingface.co/docs/transformers/perplexity. A smaller stride gives tokens more context, for more work.
    Raises LlamaError, before any forward pass, for texts that aren't a
    list of dialogs and of strings of at least one character, and for a stride outside [1, max_seq_len); after the
    passes for logprobs that aren't finite.
    """
    model, size = engine.model, engine.model.params.max_seq_len
    with engine.together("score", texts=texts, options=(stride, options)):
        stride = resolve_stride(stride, size)
        tokens = encode_inputs(engine.tokenizer, formatter, texts, **options)
    logprobs = [[0.0] * len(text) for text in tokens]
    windows = [window for i, text in enumerate(tokens) for window in split_windows(i, len(text), size, stride)]
    windows.sort(key=lambda window: window.start - window.end)  # the longest first
    sequences = [
        engine.maker.make_reading(i, tokens[w.text][w.start : w.end], first=w.first - w.start)
        for i, w in enumerate(windows)
    ]
    for s in read_all(engine, sequences, "scoring"):
        window = windows[s.index]
        logprobs[window.text][window.first : window.end] = s.prompt_logprobs[s.first :]
    for i, text_logprobs in enumerate(logprobs):
        if not all(map(math.isfinite, text_logprobs)):
            raise not_finite_error(model, engine.together, f"text {i}: the logprobs are")
    return [Score(text, text_logprobs) for text, text_logprobs in zip(tokens, logprobs, strict=True)]


@torch.no_grad()
def embed(
    engine: Engine,
    texts: Sequence[Text],
    pooling: Pooling = "last",
    formatter: AnyChatFormat | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """A vector for each text, float32 (texts, dim) on the CPU, from the normed hidden states before the output layer.

    pooling: "last" takes the last token's state, "mean" the mean over all tokens, with those that the tokenizer puts
    around a text, such as end-of-text. Texts, formatter and options are as in `score`.
    Raises LlamaError, before any forward pass, for texts that aren't a
    list of texts and dialogs of at least one character and at most max_seq_len tokens; after the passes for vectors
    that aren't finite.
    """
    with engine.together("embed", texts=texts, options=(pooling, options)):
        if pooling not in get_args(Pooling):
            raise LlamaError(f"pooling is {shorten(pooling)}, expected {' or '.join(map(repr, get_args(Pooling)))}")
        tokens = encode_inputs(engine.tokenizer, formatter, texts, **options)
        check_lengths(tokens, engine.model.params.max_seq_len)
    return embed_tokens(engine, tokens, pooling)


@torch.no_grad()
def embed_tokens(
    engine: Engine, tokens: Sequence[list[int]], pooling: Pooling = "last", ending: Ending | None = None
) -> Tensor:
    """As `embed`, for texts of ids that fit the model. Raises LlamaError where it is ended."""
    model = engine.model
    make_pool = LastPool if pooling == "last" else MeanPool
    pools = [make_pool(len(text)) for text in tokens]
    vectors = torch.empty(len(tokens), model.params.dim)
    for i in read_states(engine, tokens, pools, "embedding", ending):
        vectors[i] = pools[i].vector.float().cpu()
    for i in (~vectors.isfinite().all(dim=-1)).nonzero().flatten().tolist():
        raise not_finite_error(model, engine.together, f"text {i}: the hidden states are")
    return vectors


# --- checks -----------------------------------------------------------------------------------------------------------


def resolve_stride(stride: int | None, size: int) -> int:
    """The stride to use in windows of `size` tokens. Raises LlamaError."""
    if size < 2:
        raise LlamaError(f"max_seq_len is {size}, within which no token follows another: build with at least 2")
    if stride is None:
        return size // 2
    if not is_integer(stride, 1) or stride >= size:
        raise LlamaError(f"stride is {shorten(stride)}, expected a whole number in [1, {size}), less than max_seq_len")
    return int(stride)


def check_lengths(tokens: Sequence[Sequence[int]], most: int) -> None:
    """Raise LlamaError for a text of more than `most` tokens."""
    for i, text in enumerate(tokens):
        if len(text) > most:
            raise LlamaError(
                f"text {i} has {len(text)} tokens, but max_seq_len is {most}: "
                "shorten it or build with a larger max_seq_len"
            )


# --- batches and passes -----------------------------------------------------------------------------------------------


def split_windows(text: int, length: int, size: int, stride: int) -> Iterator[ScoringWindow]:
    """Windows of at most `size` tokens, in order, that together score each of `length` tokens but the first once."""
    start, scored = 0, 1
    while scored < length:
        end = min(start + size, length)
        yield ScoringWindow(text, start, end, scored)
        start, scored = start + stride, end


def read_all(engine: Engine, sequences: list[TokenSequence], label: str) -> Iterator[TokenSequence]:
    """Sequences as they were read, under a progress bar with this label, which counts tokens."""
    with progress_bar(label, sum(len(s.prompt) for s in sequences), " tokens", delayed=True) as bar:
        for s in engine.read(sequences):
            yield s
            bar.update(len(s.prompt))


def read_states(
    engine: Engine, rows: Sequence[list[int]], consumers: Sequence[Consume], label: str, ending: Ending | None = None
) -> Iterator[int]:
    """Places of rows of tokens, each as soon as its consumer was given the states of all its tokens."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    texts = [engine.maker.make_reading(i, rows[i], consume=consumers[i]) for i in order]
    ending = ending or Ending()
    ending.check(texts)
    for s in read_all(engine, texts, label):
        ending.check(texts)
        yield s.index


class LastPool:
    """The state of a text's last token: `vector` (dim), once it was given the states of all."""

    vector: Tensor

    def __init__(self, length: int):
        self._last = length - 1

    def __call__(self, start: int, states: Tensor) -> None:
        if start + len(states) > self._last:
            self.vector = states[-1].clone()


class MeanPool:
    """The mean of the states of a text's tokens, summed in float32: `vector` (dim)."""

    def __init__(self, length: int):
        self._length = length
        self._sum: Tensor | None = None

    def __call__(self, start: int, states: Tensor) -> None:
        new = states.sum(dim=0, dtype=torch.float32)
        self._sum = new if self._sum is None or start == 0 else self._sum + new

    @property
    def vector(self) -> Tensor:
        return cast(Tensor, self._sum) / self._length
