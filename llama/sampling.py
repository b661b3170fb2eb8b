"""Logits -> next token: pure functions on tensors. Knows no model, no tokenizer and no state.

A function under `@implements(name)` is what the setting of that name does. Random numbers are arguments, so that the
caller decides which sequence draws which. Of each token's logits, `apply_logits_processors` comes first, then `sample`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import LlamaError
from .settings import LogitsProcessor, Settings

NEVER = float("-inf")
HEADS = (1 << 10, 1 << 14)  # how many of the likeliest tokens are sorted first, in the hope that they are enough

F = TypeVar("F", bound=Callable[..., Tensor])
FUNCTIONS: dict[str, Callable[..., Tensor]] = {}  # by the name of the setting


def implements(name: str) -> Callable[[F], F]:
    """Register what the setting of this name does."""

    def register(function: F) -> F:
        FUNCTIONS[name] = function
        return function

    return register


def sample_top_p(probs: Tensor, p: float, *, uniform: Tensor | None = None) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): draw from the smallest set of likeliest tokens whose mass reaches `p`.

    probs: (..., vocab_size). A token is dropped when the mass of those likelier than it exceeds `p`; what is kept is
    renormalised. uniform: (..., 1), numbers in [0, 1) that make the draw (the token at that quantile of what is kept);
    torch's global generator gives them where None. Returns token ids (..., 1).

    The likeliest tokens come first; where all are kept, they come by id: which of two equally likely ones is drawn then
    doesn't hang on how their logits were rounded.
    """
    probs = probs.float()
    if uniform is None:
        uniform = torch.rand(*probs.shape[:-1], 1, device=probs.device)
    if p >= 1:
        cdf = probs.cumsum(dim=-1)
        place = torch.searchsorted(cdf, uniform.to(cdf.dtype) * cdf[..., -1:], right=True)
        ids = torch.arange(probs.shape[-1], device=probs.device)
        return torch.minimum(place, ids.where(probs > 0, 0).amax(dim=-1, keepdim=True))
    sorted_probs, sorted_ids = sort_likeliest(probs, p)
    kept = is_in_nucleus(sorted_probs, p)
    cdf = sorted_probs.where(kept, 0).cumsum(dim=-1)
    place = torch.searchsorted(cdf, uniform.to(cdf.dtype) * cdf[..., -1:], right=True)
    last = (kept & (sorted_probs > 0)).sum(dim=-1, keepdim=True) - 1  # rounding must not reach a dropped token
    return sorted_ids.gather(-1, torch.minimum(place, last.clamp(min=0)))


def sort_likeliest(probs: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Probabilities (..., vocab_size) and their tokens from the likeliest on, equal ones by id: both (..., N).

    N is vocab_size. On a CPU, which takes 10 ms to sort 128,256 numbers, it is less where fewer make up the mass `p`.
    """
    for few in (few for few in HEADS if few < probs.shape[-1] and probs.device.type == "cpu"):
        values, ids = probs.topk(few)
        least = values[..., -1:]
        # topk may have left out tokens that are as likely as its last one. So this is enough only where tokens of that
        # probability are outside of the nucleus, or are never drawn.
        if bool(((values > least) | ~is_in_nucleus(values, p) | (least == 0)).all()):
            ids = ids.sort(dim=-1).values
            values, order = torch.sort(probs.gather(-1, ids), dim=-1, descending=True, stable=True)
            return values, ids.gather(-1, order)
    return torch.sort(probs, dim=-1, descending=True, stable=True)


def is_in_nucleus(sorted_probs: Tensor, p: float) -> Tensor:
    """Which of descending probabilities make up the mass `p`: booleans of the same shape."""
    mass = sorted_probs.cumsum(dim=-1)
    return mass - sorted_probs <= p if p < 1 else torch.ones_like(mass, dtype=torch.bool)  # sums may round to over 1


# --- stage "narrowing": logits (..., vocab_size) -> the same, NEVER where a token is not to be drawn ------------------


@implements("temperature")
def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature, which isn't 0."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # without the difference it may overflow


@implements("top_k")
def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens, and those as likely as the last of them (arXiv:1805.04833, section 5.4)."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.where(logits >= least, NEVER)


@implements("top_p")
def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep what `sample_top_p` draws from."""
    sorted_probs, ids = sort_likeliest(torch.softmax(logits, dim=-1), p)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, is_in_nucleus(sorted_probs, p))
    return logits.where(kept, NEVER)


@implements("min_p")
def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens that are at least `p` times as probable as the likeliest (arXiv:2407.01082)."""
    probs = torch.softmax(logits, dim=-1)
    return logits.where(probs >= p * probs.amax(dim=-1, keepdim=True), NEVER)


# --- stage "logits": one sequence's logits (vocab_size), the setting's value, the text so far -> the logits -----------


@dataclass(frozen=True)
class Context:
    """The tokens of one sequence, as functions of the stage "logits" see them."""

    prompt: Sequence[int]
    answer: Sequence[int] = ()
    stops: Collection[int] = frozenset()  # tokens that end the answer

    @cached_property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


@implements("logit_bias")
def add_bias(logits: Tensor, bias: Mapping[int, float], context: Context) -> Tensor:
    """Add to the logits of these token ids (the OpenAI API's `logit_bias`)."""
    ids = torch.tensor(list(bias), dtype=torch.long, device=logits.device)
    return logits.index_add(0, ids, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


@implements("repetition_penalty")
def penalize_repetition(logits: Tensor, penalty: float, context: Context) -> Tensor:
    """Divide the logits of tokens that have occurred by `penalty`, and multiply negative ones by it.

    arXiv:1909.05858, section 4.1. Negative logits are multiplied as in transformers, so that they too become less
    likely.
    """
    ids = torch.tensor(context.tokens, dtype=torch.long, device=logits.device)
    before = logits[ids]
    return logits.scatter(0, ids, torch.where(before < 0, before * penalty, before / penalty))


@implements("presence_penalty")
def penalize_presence(logits: Tensor, penalty: float, context: Context) -> Tensor:
    """Take `penalty` off the logit of each token of the answer.

    The OpenAI API's definition: logit[j] - count[j] * frequency_penalty - (count[j] > 0) * presence_penalty.
    """
    return logits - penalty * (count_tokens(context.answer, logits) > 0)


@implements("frequency_penalty")
def penalize_frequency(logits: Tensor, penalty: float, context: Context) -> Tensor:
    """Take `penalty` off the logit of each token of the answer, for each time that it occurs there."""
    return logits - penalty * count_tokens(context.answer, logits)


@implements("no_repeat_ngram_size")
def forbid_repeated_ngrams(logits: Tensor, size: int, context: Context) -> Tensor:
    """Forbid each token with which the last `size` would have occurred before (arXiv:1705.04304, section 2.5)."""
    tokens = context.tokens
    start = len(tokens) - (size - 1)
    if start < 1:
        return logits
    tail = tuple(tokens[start:])
    return forbid(logits, (tokens[i + size - 1] for i in range(start) if tuple(tokens[i : i + size - 1]) == tail))


@implements("min_gen_len")
def forbid_early_stops(logits: Tensor, count: int, context: Context) -> Tensor:
    """Forbid the stop tokens while the answer has fewer than `count` tokens."""
    return forbid(logits, context.stops) if len(context.answer) < count else logits


@implements("logits_processor")
def call_logits_processor(logits: Tensor, function: LogitsProcessor, context: Context) -> Tensor:
    """What the caller's function returns. Raises LlamaError where that isn't logits."""
    result = function(context.tokens, logits)
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.shape != logits.shape:
        kind = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise LlamaError(f"logits_processor returned {kind}, expected a float tensor of shape {tuple(logits.shape)}")
    return result.to(logits)


def forbid(logits: Tensor, ids: Iterable[int]) -> Tensor:
    """Make sure that these token ids are never chosen."""
    places = torch.tensor(sorted({*ids}), dtype=torch.long, device=logits.device)
    return logits.index_fill(0, places, NEVER)


def count_tokens(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs, in the dtype of `logits` (vocab_size): (vocab_size)."""
    ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    return torch.bincount(ids, minlength=logits.shape[-1]).to(logits.dtype)


# --- all of them, in the order of the fields of `Settings` ------------------------------------------------------------


def apply_logits_processors(logits: Tensor, settings: Settings, context: Context) -> Tensor:
    """One sequence's logits (vocab_size) after the settings of the stage "logits"."""
    for name, value in settings.select_active("logits").items():
        logits = FUNCTIONS[name](logits, value, context)
    return logits


def narrow(logits: Tensor, active: Iterable[tuple[str, Any]]) -> Tensor:
    """Logits (..., vocab_size) after these settings of the stage "narrowing": what is drawn from."""
    logits = logits.float()
    for name, value in active:
        logits = FUNCTIONS[name](logits, value)
    return logits


def sample(logits: Tensor, settings: Settings, uniform: Tensor | None = None) -> Tensor:
    """The next token of each sequence: at temperature 0 the likeliest, else drawn after `settings.narrowing`.

    logits: float32 (B, vocab_size); uniform: (B, 1) as in `sample_top_p`. Returns (B,).
    """
    if settings.temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    *active, last = settings.narrowing
    name, nucleus = last
    if name != "top_p":  # else the draw itself keeps to the nucleus, which saves a sort
        active, nucleus = [*active, last], 1.0
    return sample_top_p(torch.softmax(narrow(logits, active), dim=-1), nucleus, uniform=uniform).squeeze(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32: logits (..., vocab_size), tokens (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)
