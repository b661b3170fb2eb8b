"""Logits -> next token: pure functions on tensors. Knows no model, no tokenizer and no state of its own.

The randomness comes in as numbers, so that whoever calls decides whose they are. In `chosen` all of it comes together.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import LlamaError
from .settings import Settings

NEVER = float("-inf")
HEADS = (1 << 10, 1 << 14)  # tokens among which what is drawn from is looked for first


def sample_top_p(probs: Tensor, p: float, *, uniform: Tensor | None = None) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): draw from the smallest set of likeliest tokens whose mass reaches `p`.

    probs: (..., vocab_size). A token is dropped when the mass of those likelier than it exceeds `p`; what is kept is
    renormalised. uniform: (..., 1), numbers in [0, 1) that make the draw (the token at that quantile of what is kept);
    torch's global generator gives them where None. Returns token ids (..., 1).
    """
    sorted_probs, sorted_ids = descending(probs.float(), p)
    kept = likeliest(sorted_probs, p)
    cdf = sorted_probs.where(kept, 0).cumsum(dim=-1)
    if uniform is None:
        uniform = torch.rand(*probs.shape[:-1], 1, device=probs.device)
    place = torch.searchsorted(cdf, uniform.to(cdf.dtype) * cdf[..., -1:], right=True)
    last = (kept & (sorted_probs > 0)).sum(dim=-1, keepdim=True) - 1  # rounding must not reach a dropped token
    return sorted_ids.gather(-1, torch.minimum(place, last.clamp(min=0)))


def descending(probs: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Probabilities (..., vocab_size) and their tokens from the likeliest on, equals by id: (..., N) both.

    All of them; or on a CPU, which sorts 128,256 numbers in 10 ms, the first few where these make up the mass `p`.
    """
    for few in (few for few in HEADS if few < probs.shape[-1] and probs.device.type == "cpu"):
        values, ids = probs.topk(few)
        least = values[..., -1:]
        # Of those as likely as the last one some may be missing: none of them may be kept, unless it is never drawn.
        if bool(((values > least) | ~likeliest(values, p) | (least == 0)).all()):
            ids = ids.sort(dim=-1).values
            values, order = torch.sort(probs.gather(-1, ids), dim=-1, descending=True, stable=True)
            return values, ids.gather(-1, order)
    return torch.sort(probs, dim=-1, descending=True, stable=True)


def likeliest(sorted_probs: Tensor, p: float) -> Tensor:
    """Which of descending probabilities make up the mass `p`: booleans of the same shape."""
    mass = sorted_probs.cumsum(dim=-1)
    return mass - sorted_probs <= p if p < 1 else torch.ones_like(mass, dtype=torch.bool)  # sums may round to over 1


# --- what narrows a distribution: logits (..., vocab_size) -> the same, NEVER where a token isn't to be drawn ---------


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens, and those as likely as the last of them (arXiv:1805.04833, section 5.4)."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.where(logits >= least, NEVER)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep what `sample_top_p` draws from."""
    sorted_probs, ids = descending(torch.softmax(logits, dim=-1), p)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, likeliest(sorted_probs, p))
    return logits.where(kept, NEVER)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens that are at least `p` times as probable as the likeliest (arXiv:2407.01082)."""
    probs = torch.softmax(logits, dim=-1)
    return logits.where(probs >= p * probs.amax(dim=-1, keepdim=True), NEVER)


# --- what looks at the text so far: one row's logits (vocab_size) -> the same -----------------------------------------


def logit_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add to the logits of these token ids (the OpenAI API's `logit_bias`)."""
    ids = torch.tensor(list(bias), dtype=torch.long, device=logits.device)
    return logits.index_add(0, ids, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


def repetition_penalty(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Divide the logits of tokens that have occurred by `penalty`, and multiply negative ones by it.

    arXiv:1909.05858, section 4.1; of negative logits as transformers has it, so that they too become less likely.
    """
    ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    own = logits[ids]
    return logits.scatter(0, ids, torch.where(own < 0, own * penalty, own / penalty))


def count_penalties(logits: Tensor, tokens: Sequence[int], presence: float, frequency: float) -> Tensor:
    """Take `presence` off the logit of each token that has occurred, and `frequency` for each time that it has.

    The OpenAI API's definition: logit[j] - count[j] * frequency - (count[j] > 0) * presence.
    """
    ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    counts = torch.bincount(ids, minlength=logits.shape[-1]).to(logits.dtype)
    return logits - frequency * counts - presence * (counts > 0)


def no_repeat_ngrams(logits: Tensor, tokens: Sequence[int], size: int) -> Tensor:
    """Forbid each token with which the last `size` would have occurred before (arXiv:1705.04304, section 2.5)."""
    start = len(tokens) - (size - 1)
    if start < 1:
        return logits
    tail = tuple(tokens[start:])
    return forbid(logits, (tokens[i + size - 1] for i in range(start) if tuple(tokens[i : i + size - 1]) == tail))


def forbid(logits: Tensor, ids: Iterable[int]) -> Tensor:
    """Let these token ids never be chosen."""
    places = torch.tensor(sorted({*ids}), dtype=torch.long, device=logits.device)
    return logits.index_fill(0, places, NEVER)


def processed(
    logits: Tensor, prompt: Sequence[int], answer: Sequence[int], settings: Settings, stops: Iterable[int]
) -> Tensor:
    """One row's logits (vocab_size) as its settings and its text so far want them, in the order of `Settings`' fields.

    stops: the ids that end a row.
    """
    tokens = [*prompt, *answer]
    if settings.logit_bias:
        logits = logit_bias(logits, settings.logit_bias)
    if settings.repetition_penalty != 1:
        logits = repetition_penalty(logits, tokens, settings.repetition_penalty)
    if settings.presence_penalty or settings.frequency_penalty:
        logits = count_penalties(logits, answer, settings.presence_penalty, settings.frequency_penalty)
    if settings.no_repeat_ngram_size:
        logits = no_repeat_ngrams(logits, tokens, settings.no_repeat_ngram_size)
    if len(answer) < settings.min_gen_len:
        logits = forbid(logits, stops)
    if settings.logits_processor is None:
        return logits
    found = settings.logits_processor(tokens, logits)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != logits.shape:
        kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise LlamaError(f"logits_processor returned {kind}, expected a float tensor of shape {tuple(logits.shape)}")
    return found.to(logits)


def cooled(logits: Tensor, settings: Settings) -> Tensor:
    """Logits (..., vocab_size) after temperature, which isn't 0, and top_k."""
    logits = logits.float()
    logits = (
        logits - logits.amax(dim=-1, keepdim=True)
    ) / settings.temperature  # without the difference it may overflow
    return logits if settings.top_k is None else top_k(logits, settings.top_k)


def narrowed(logits: Tensor, settings: Settings) -> Tensor:
    """Logits (..., vocab_size) after temperature, top_k, top_p and min_p, in this order: what is drawn from."""
    logits = cooled(logits, settings)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    return min_p(logits, settings.min_p) if settings.min_p > 0 else logits


def sample(logits: Tensor, settings: Settings, uniform: Tensor | None = None) -> Tensor:
    """The next token of each row: drawn from the softmax of `narrowed`, at temperature 0 the likeliest.

    logits: float32 (B, vocab_size); uniform: (B, 1) as in `sample_top_p`. Returns (B,).
    """
    if settings.temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    if settings.min_p > 0:
        left, nucleus = narrowed(logits, settings), 1.0
    else:
        left, nucleus = cooled(logits, settings), settings.top_p  # which the draw itself looks for
    return sample_top_p(torch.softmax(left, dim=-1), nucleus, uniform=uniform).squeeze(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32: logits (..., vocab_size), tokens (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)
