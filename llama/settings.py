"""How a sequence is continued: what a caller may set for it, which values each setting may have, and where it acts.

Each field of `Settings` is described once, by its metadata (`Setting`). The checks, the names that calls and files may
use, and the command line's options follow from it. What a setting of the stages "logits" and "narrowing" does is the
function in `sampling.py` that is registered under its name. Knows numbers and strings; knows no tensors and no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from ._util.response_format import DESCRIPTION, is_response_format
from ._util.validate import is_integer, is_number, suggest
from .errors import LlamaError, shorten

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
# Where a setting acts, in the order of the work. "logits": changes the logits of one sequence, looking at its tokens so
# far. "grammar": forbids what leads out of a form. "narrowing": changes the distribution that a token is drawn from.
# "stopping": says where an answer ends. "length": says how long it gets. "randomness": says where the draws come from.
Stage = Literal["logits", "grammar", "narrowing", "stopping", "length", "randomness"]
LARGEST_PENALTY = 2.0  # of presence and frequency, in both directions, as the OpenAI API has them


# What `Llama.generate`, `text_completion` and `chat_completion` take by name beside the settings: of `complete`.
CALL_OPTIONS = frozenset(
    {"n", "best_of", "rows", "top_logprobs", "prompt_logprobs", "lookup_ngram", "speculate_k"}
    | {"num_beams", "length_penalty", "early_stopping", "num_return_sequences", "prefix_cache", "ordered_rows"}
)


@dataclass(frozen=True)
class Values:
    """The values that a setting may have."""

    description: str  # for error messages, after "expected"
    include: Callable[[Any], bool]
    parse: Callable[[str], Any] = str  # from a word of the command line


def numbers(least: float = -math.inf, most: float = math.inf, *, whole: bool = False, above: bool = False) -> Values:
    """The finite numbers from `least` to `most`; above: without `least` itself; whole: the integers among them."""
    is_kind: Callable[[Any], bool] = is_integer if whole else is_number
    description = "a whole number" if whole else "a number"
    if most < math.inf:
        description += f" in {'(' if above else '['}{least:g}, {most:g}]"
    elif least > -math.inf:
        description += f" above {least:g}" if above else f" of at least {least:g}"

    def include(value: Any) -> bool:
        return is_kind(value) and (least < value if above else least <= value) and value <= most

    return Values(description, include, int if whole else float)


def is_text_or_texts(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)


def is_list_of_ids(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(is_integer(i, 0) for i in value)


def is_bias_by_id(value: object) -> bool:
    return isinstance(value, Mapping) and all(is_integer(k, 0) and is_number(v) for k, v in value.items())


@dataclass(frozen=True)
class Setting:
    """The metadata of one field of `Settings`."""

    stage: Stage
    values: Values  # and None, where it is the default
    help: str  # X, N or TEXT stands for the value
    idle: Any = None  # the value with which it does nothing, in the stages "logits" and "narrowing"
    on_command_line: bool = False  # whether commands have it as an option


def setting(default: Any, stage: Stage, values: Values, help: str, idle: Any = None, option: bool = False) -> Any:
    """A field of `Settings`. default: a value, or a type to call for one. The rest becomes its `Setting`."""
    kind = "default_factory" if isinstance(default, type) else "default"
    return field(**{kind: default}, metadata={"setting": Setting(stage, values, help, idle, option)})


FORMATS = Values(DESCRIPTION, is_response_format)
PENALTIES = numbers(-LARGEST_PENALTY, LARGEST_PENALTY)
COUNTS, COUNTS_FROM_1 = numbers(0, whole=True), numbers(1, whole=True)
BIASES = Values("numbers by token id", is_bias_by_id)
PROCESSORS = Values("a function of tokens and logits, or None", callable)
TEXTS = Values("a text or a list of texts, none of them empty", is_text_or_texts)
TOKEN_IDS = Values("a list of token ids", is_list_of_ids)


@dataclass(frozen=True)
class Settings:
    """The settings of one sequence. Those of a stage act in the order of the fields, which is that of transformers.

    Raises LlamaError, with the setting's name, its value and the values it may have, for any other value.
    """

    logit_bias: Mapping[int, float] = setting(
        dict, "logits", BIASES, "what to add to the logits of these token ids", idle={}
    )
    repetition_penalty: float = setting(
        1.0, "logits", numbers(0, above=True), "above 1, repeated tokens get less likely", idle=1, option=True
    )
    presence_penalty: float = setting(
        0.0, "logits", PENALTIES, "take X off the logit of each token that the answer has", idle=0
    )
    frequency_penalty: float = setting(
        0.0, "logits", PENALTIES, "take X off a token's logit for each time that the answer has it", idle=0
    )
    no_repeat_ngram_size: int = setting(
        0, "logits", COUNTS, "no N tokens in a row occur twice in prompt and answer (0: any may)", idle=0
    )
    min_gen_len: int = setting(0, "logits", COUNTS, "choose no stop token before the answer has N tokens", idle=0)
    logits_processor: LogitsProcessor | None = setting(  # noqa: RUF009
        None,
        "logits",
        PROCESSORS,
        "a function of the tokens so far and the logits, float32 (vocab_size), that returns the logits to use",
    )
    temperature: float = setting(
        0.6, "narrowing", numbers(0), "divide logits by X; 0 takes the likeliest token", option=True
    )
    top_k: int | None = setting(
        None, "narrowing", COUNTS_FROM_1, "draw from the N likeliest tokens (default: all)", option=True
    )
    top_p: float = setting(
        0.9, "narrowing", numbers(0, 1, above=True), "draw from the likeliest tokens of mass X", idle=1, option=True
    )
    min_p: float = setting(
        0.0, "narrowing", numbers(0, 1), "drop tokens less than X times as likely as the likeliest", idle=0, option=True
    )
    response_format: Mapping[str, Any] | None = setting(
        None, "grammar", FORMATS, "hold the answer to JSON, a JSON schema, a regex, texts to choose from or a grammar"
    )
    max_gen_len: int | None = setting(
        None, "length", COUNTS_FROM_1, "most tokens of an answer (default: as max_seq_len allows)", option=True
    )
    stop: Sequence[str] = setting((), "stopping", TEXTS, "end an answer before TEXT; may be repeated", option=True)
    stop_token_ids: Sequence[int] = setting(
        (), "stopping", TOKEN_IDS, "tokens that end an answer, beside the tokenizer's own"
    )
    seed: int | None = setting(
        None,
        "randomness",
        numbers(whole=True),
        "of this sequence (default: made from Llama.build's seed, the prompt, and how often it was given)",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, values = getattr(self, f.name), f.metadata["setting"].values
            if not (value is None and f.default is None) and not values.include(value):
                raise LlamaError(f"{f.name} is {shorten(value)}, expected {values.description}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # of any kind of mapping
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_gen_len is not None and self.min_gen_len > self.max_gen_len:
            raise LlamaError(
                f"min_gen_len is {self.min_gen_len} and max_gen_len {self.max_gen_len}: "
                "lower the one or raise the other"
            )

    def select_active(self, stage: Stage) -> dict[str, Any]:
        """The settings of a stage that do something, by name, in the order in which they act."""
        values = {name: getattr(self, name) for name in SETTINGS if SETTINGS[name].stage == stage}
        return {name: value for name, value in values.items() if value != SETTINGS[name].idle}

    @cached_property
    def changes_logits(self) -> bool:
        """Whether any setting of the stage "logits" does something."""
        return bool(self.select_active("logits"))

    @property
    def is_constrained(self) -> bool:
        """Whether the answer is held to a form."""
        return self.response_format is not None and self.response_format["type"] != "text"

    @cached_property
    def narrowing(self) -> tuple[tuple[str, Any], ...]:
        """The active settings of the stage "narrowing": sequences that share them are sampled together."""
        return tuple(self.select_active("narrowing").items())


SETTINGS: Mapping[str, Setting] = {f.name: f.metadata["setting"] for f in fields(Settings)}
NAMES = frozenset(SETTINGS)


def settings_of_rows(
    count: int, shared: Mapping[str, Any], rows: Sequence[Mapping[str, Any] | None] | None
) -> list[Settings]:
    """The settings of each of `count` prompts: its own entry of `rows`, and `shared` for what that doesn't set.

    Raises LlamaError.
    """
    rows = [None] * count if rows is None else rows
    if not isinstance(rows, list | tuple) or len(rows) != count:
        content = f"{len(rows)} entries" if isinstance(rows, list | tuple) else f"a {type(rows).__name__}"
        raise LlamaError(f"rows has {content}, expected a list of {count}: a dict of settings or None for each prompt")
    return [_merge(i, shared, row) for i, row in enumerate(rows)]


def _merge(index: int, shared: Mapping[str, Any], row: Mapping[str, Any] | None) -> Settings:
    if row is not None and not isinstance(row, Mapping):
        raise LlamaError(f"rows[{index}] is a {type(row).__name__}, expected a dict of settings or None")
    values = {**shared, **(row or {})}
    try:
        if unknown := sorted(map(str, values.keys() - NAMES)):
            others = "" if row else f"; calls also take {', '.join(sorted(CALL_OPTIONS))}"
            others += suggest(unknown[0], NAMES if row else NAMES | CALL_OPTIONS)
            raise LlamaError(f"{shorten(unknown[0])} is no setting: known are {', '.join(sorted(NAMES))}{others}")
        return Settings(**values)
    except LlamaError as e:
        raise LlamaError(f"rows[{index}]: {e}") if row else e from None
