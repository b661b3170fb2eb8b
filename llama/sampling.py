"""Logits -> next token: pure functions on tensors. Knows no model, no tokenizer and no state of its own.

The randomness comes in as numbers, so that whoever calls decides whose they are.
"""

import torch
from torch import Tensor


def sample_top_p(probs: Tensor, p: float, *, uniform: Tensor | None = None) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): draw from the smallest set of likeliest tokens whose mass reaches `p`.

    probs: (..., vocab_size). A token is dropped when the mass of those likelier than it exceeds `p`; what is kept is
    renormalised. uniform: (..., 1), numbers in [0, 1) that make the draw (the token at that quantile of what is kept);
    torch's global generator gives them where None. Returns token ids (..., 1).
    """
    sorted_probs, sorted_ids = torch.sort(probs.float(), dim=-1, descending=True, stable=True)
    mass = sorted_probs.cumsum(dim=-1)
    kept = mass - sorted_probs <= p if p < 1 else torch.ones_like(mass, dtype=torch.bool)  # sums may round to over 1
    cdf = sorted_probs.where(kept, 0).cumsum(dim=-1)
    if uniform is None:
        uniform = torch.rand(*probs.shape[:-1], 1, device=probs.device)
    place = torch.searchsorted(cdf, uniform.to(cdf.dtype) * cdf[..., -1:], right=True)
    last = (kept & (sorted_probs > 0)).sum(dim=-1, keepdim=True) - 1  # rounding must not reach a dropped token
    return sorted_ids.gather(-1, torch.minimum(place, last.clamp(min=0)))


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor | None = None) -> Tensor:
    """The next token of each row: argmax at temperature 0, else from the nucleus of softmax(logits / temperature).

    logits: float32 (B, vocab_size); uniform: (B, 1) as in `sample_top_p`. Returns (B,).
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits.float()
    likeliest = logits.amax(dim=-1, keepdim=True)  # taken off before the division, which may overflow
    probs = torch.softmax((logits - likeliest) / temperature, dim=-1)
    return sample_top_p(probs, top_p, uniform=uniform).squeeze(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32: logits (..., vocab_size), tokens (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)
