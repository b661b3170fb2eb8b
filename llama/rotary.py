"""The frequencies of rotary embeddings (arXiv:2104.09864), and how they are scaled for texts longer than in training.

Knows numbers only.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import LlamaError, shorten

SMALLEST, LARGEST = 1e-6, 2**31  # bounds of any number in a configuration
LENGTHS = ("factor", "original_max_position_embeddings")  # fields that are at least 1
NUMBERS = (*LENGTHS, "low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast", "attention_factor")
ScalingType = Literal["linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """A published method of scaling rotary embeddings. Raises LlamaError for unknown types and values out of range."""

    # linear: positions are divided by `factor` (arXiv:2306.15595).
    # dynamic: the base grows with a row that is longer than the original length, see `grow_theta`.
    # llama3: the frequencies of slow pairs are divided by `factor`, those of fast pairs are kept, and those between are
    # interpolated by frequency (arXiv:2407.21783).
    # yarn: the same, interpolated by the index of the pair, and attention is sharpened (arXiv:2309.00071).
    type: ScalingType
    factor: float  # by which texts get longer
    original_max_position_embeddings: int = 8192  # the length in training; not of linear
    low_freq_factor: float = 1.0  # llama3: slow pairs turn less often than this in the original length ...
    high_freq_factor: float = 4.0  # ... and fast pairs more often than this
    beta_slow: float = 1.0  # yarn: the same two bounds
    beta_fast: float = 32.0
    attention_factor: float | None = None  # yarn: multiplies the rotated queries and keys; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the bounds outwards to whole pairs

    def __post_init__(self) -> None:
        if self.type not in (types := get_args(ScalingType)):
            raise LlamaError(f"rope scaling {shorten(self.type)} is not known: expected {', '.join(types)}")
        if not isinstance(self.truncate, bool):
            raise LlamaError(f"rope scaling has truncate {shorten(self.truncate)}, expected true or false")
        for name in NUMBERS:
            value, least = getattr(self, name), 1 if name in LENGTHS else SMALLEST
            if value is None and name == "attention_factor":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < LARGEST:
                raise LlamaError(f"rope scaling has {name} {shorten(value)}, expected a number of at least {least}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                bounds = f"{low} {getattr(self, low)} and {high} {getattr(self, high)}"
                raise LlamaError(f"rope scaling has {bounds}, expected the first below the second")


def powers(dim: int, theta: float | Tensor) -> Tensor:
    """Radians per position of each pair, theta^(-2j / dim): float32 (dim / 2), or (..., dim / 2) for bases (..., 1)."""
    exponents = torch.arange(0, dim, 2)[: dim // 2].float() / dim  # (dim / 2)
    return 1.0 / theta ** (exponents.to(theta.device) if isinstance(theta, Tensor) else exponents)


def frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, float]:
    """(`powers` after scaling, float32 (dim / 2); the factor of the rotated queries and keys).

    dim: head size. theta: the base. For `dynamic`, the result is for rows within the original length.
    """
    plain = powers(dim, theta)
    if scaling is None or scaling.type == "dynamic":
        return plain, 1.0
    stretched = plain / scaling.factor
    if scaling.type == "linear":
        return stretched, 1.0
    if scaling.type == "llama3":
        turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # in the original length
        fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(stretched, plain, fast.clamp(0, 1)), 1.0
    slow = _yarn_ramp(dim, theta, scaling)
    attention = 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
    return torch.lerp(plain, stretched, slow), attention


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """Rotary angles (arXiv:2104.09864) as complex numbers: complex64 of shape (end, dim / 2).

    Row t holds exp(i * t * theta^(-2j / dim)) for j in 0..dim/2, changed by `scaling`. Built on torch's current default
    device.
    """
    freqs, length = frequencies(dim, theta, scaling)  # (dim / 2)
    angles = torch.outer(torch.arange(end, dtype=torch.float32), freqs)  # (end, dim / 2)
    return torch.polar(torch.full_like(angles, length), angles)


def compute_dynamic_freqs_cis(
    dim: int, positions: Tensor, lengths: Tensor | None, theta: float, scaling: RopeScaling
) -> Tensor:
    """Angles of `dynamic` at positions (T) or (B, T), as complex numbers: complex64 (T, dim / 2) or (B, T, dim / 2).

    lengths: tokens of each row without padding, (B); or up to each token, (B, T). None: rows have no padding.
    """
    ends = positions[..., -1:] + 1 if lengths is None else positions[..., :1] + lengths.view(len(lengths), -1)
    angles = positions[..., None] * powers(dim, grow_theta(dim, theta, scaling, ends))  # ([B], T, dim / 2)
    return torch.polar(torch.ones_like(angles), angles)


def grow_theta(dim: int, theta: float, scaling: RopeScaling, lengths: Tensor) -> Tensor:
    """The base of `dynamic` for rows of `lengths` tokens, (...) -> (..., 1): theta, or more past the original length.

    As a row grows, its new tokens are rotated by larger bases than those in the cache, as in `transformers`.
    """
    if dim <= 2:
        raise LlamaError(f"rope scaling 'dynamic' needs a head_dim of at least 4, found {dim}")
    growth = lengths.clamp(min=scaling.original_max_position_embeddings) / scaling.original_max_position_embeddings
    return (theta * (scaling.factor * growth - (scaling.factor - 1)) ** (dim / (dim - 2)))[..., None]


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """For each pair 0 (fast: kept) to 1 (slow: scaled), linear between the two bounds: (dim / 2)."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    if theta <= 1:
        raise LlamaError(f"rope scaling 'yarn' needs a rope_theta above 1, found {theta}")
    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return ((torch.arange(dim // 2).float() - first) / (last - first or 0.001)).clamp(0, 1)
