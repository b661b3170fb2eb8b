"""How a row is to be continued: all that a caller may set for it, and what values each setting may have.

Knows numbers and strings; knows no tensors and no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from torch import Tensor

from ._util.validate import is_integer, is_number
from .errors import LlamaError, shorten

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
LARGEST_PENALTY = 2.0  # of presence and frequency, in both directions, as the OpenAI API has them


class Options(TypedDict, total=False):
    """The fields of `Settings` that calls take by name."""

    top_k: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_gen_len: int
    no_repeat_ngram_size: int
    logits_processor: LogitsProcessor | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    seed: int | None


class RowOptions(Options, total=False):
    """What may differ from row to row."""

    max_gen_len: int | None
    temperature: float
    top_p: float


class Speculation(TypedDict, total=False):
    """How tokens are proposed, which changes no text."""

    lookup_ngram: int | None
    speculate_k: int


class TurnOptions(RowOptions, Speculation, total=False):
    """What `Session.stream` takes."""


class Streamed(Options, Speculation, total=False):
    """What `Llama.complete` passes on to `Llama.stream`."""

    top_logprobs: int
    rows: Sequence[RowOptions | None] | None


class Wanted(Streamed, total=False):
    """What `Llama.complete` takes by name."""

    n: int
    best_of: int | None
    prompt_logprobs: bool
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int


@dataclass(frozen=True)
class Settings:
    """Of one row. What changes logits is in the order in which it does, which is that of transformers.

    logit_bias: what is added to the logits of these token ids. repetition_penalty: see `sampling.repetition_penalty`,
    over prompt and answer; 1 is none. presence_penalty, frequency_penalty: see `sampling.count_penalties`, over the
    answer; 0 is none. no_repeat_ngram_size: no sequence of so many tokens occurs twice in prompt and answer; 0 is off.
    min_gen_len: tokens before which no stop token is chosen. logits_processor: a function of the tokens so far, prompt
    and answer, and the row's logits, float32 (vocab_size), that returns them as they shall be.
    temperature: what logits are divided by; 0 takes the likeliest token. top_k: the likeliest tokens that may be drawn;
    None: all. top_p: the mass of those. min_p: the least probability, as a share of the likeliest one's.
    max_gen_len: tokens a row gets at most; None: what fits in max_seq_len. stop: texts that end the answer before them.
    stop_token_ids: tokens that do so, beside the tokenizer's own. seed: the row's own source of chance; None: from the
    seed of `Llama.build`, the prompt, and how often that was asked.

    Raises LlamaError, naming option, value and range, for what can't be.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_gen_len: int = 0
    logits_processor: LogitsProcessor | None = None
    temperature: float = 0.6
    top_k: int | None = None
    top_p: float = 0.9
    min_p: float = 0.0
    max_gen_len: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.logits_processor is not None and not callable(self.logits_processor):
            self._refuse("logits_processor", "a function of tokens and logits, or None")
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or not all(is_integer(k, 0) and is_number(v) for k, v in bias.items()):
            self._refuse("logit_bias", "numbers by token id")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            self._refuse("stop", "a text or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(is_integer(i, 0) for i in ids):
            self._refuse("stop_token_ids", "a list of token ids")
        if self.max_gen_len is not None and self.min_gen_len > self.max_gen_len:
            found = f"min_gen_len is {self.min_gen_len} and max_gen_len {self.max_gen_len}"
            raise LlamaError(f"{found}: lower the one or raise the other")

    def _check_numbers(self) -> None:
        for name, least in (("max_gen_len", 1), ("top_k", 1)):
            if (value := getattr(self, name)) is not None and not is_integer(value, least):
                self._refuse(name, f"a whole number of at least {least}")
        for name in ("min_gen_len", "no_repeat_ngram_size"):
            if not is_integer(getattr(self, name), 0):
                self._refuse(name, "a whole number of at least 0")
        if self.seed is not None and not is_integer(self.seed):
            self._refuse("seed", "a whole number")
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            self._refuse("temperature", "a number of at least 0")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            self._refuse("top_p", "a number in (0, 1]")
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            self._refuse("min_p", "a number in [0, 1]")
        if not is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            self._refuse("repetition_penalty", "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not is_number(value) or not -LARGEST_PENALTY <= value <= LARGEST_PENALTY:
                self._refuse(name, f"a number in [-{LARGEST_PENALTY:.0f}, {LARGEST_PENALTY:.0f}]")

    def _refuse(self, name: str, expected: str) -> None:
        raise LlamaError(f"{name} is {shorten(getattr(self, name))}, expected {expected}")

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature, top_k, top_p and min_p does."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.min_gen_len
            or self.logits_processor
        )

    @property
    def narrowing(self) -> tuple[float, int | None, float, float]:
        """What a distribution is narrowed by: rows that have this in common are sampled together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


NAMES = frozenset(f.name for f in fields(Settings))


def settings_of_rows(
    count: int, shared: Mapping[str, Any], rows: Sequence[Mapping[str, Any] | None] | None
) -> list[Settings]:
    """The settings of each of `count` rows: those of all, and over them the row's own. Raises LlamaError."""
    if rows is None:
        rows = [None] * count
    if not isinstance(rows, list | tuple) or len(rows) != count:
        found = f"{len(rows)} entries" if isinstance(rows, list | tuple) else f"a {type(rows).__name__}"
        raise LlamaError(f"rows has {found}, expected a list of {count}: a dict of settings, or None, for each prompt")
    found_settings = []
    for i, own in enumerate(rows):
        if own is not None and not isinstance(own, Mapping):
            raise LlamaError(f"rows[{i}] is a {type(own).__name__}, expected a dict of settings or None")
        given = {**shared, **(own or {})}
        try:
            if unknown := sorted(map(str, given.keys() - NAMES)):
                raise LlamaError(f"{unknown[0]!r} is no setting: known are {', '.join(sorted(NAMES))}")
            found_settings.append(Settings(**given))
        except LlamaError as e:
            raise LlamaError(f"rows[{i}]: {e}") if own else e from None
    return found_settings
