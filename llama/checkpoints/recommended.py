"""The sampling settings that a model's authors recommend: those of `generation_config.json`.

Knows that file; knows no command and no model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._util.files import read_json
from ..errors import LlamaError, shorten
from ..settings import SETTINGS, Settings
from .checkpoint import Checkpoint
from .side_files import find_side_files

FILE = "generation_config.json"
NAMES = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
)
OFF = {"top_k": 0}  # what transformers has for "no limit", which is None here
# Keys that change what transformers draws, and that no setting here has -> the values with which they do nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **{"num_beams": (1,), "num_beam_groups": (1,), "typical_p": (1, 1.0), "epsilon_cutoff": (0,), "eta_cutoff": (0,)},
    **{"penalty_alpha": (0,), "diversity_penalty": (0,), "encoder_repetition_penalty": (1,), "top_h": ()},
    **{"guidance_scale": (1,), "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],)},
    **{"sequence_bias": ({},), "forced_bos_token_id": (), "forced_eos_token_id": (), "min_new_tokens": (0,)},
    **{"exponential_decay_length_penalty": (), "encoder_no_repeat_ngram_size": (0,)},
}


@dataclass(frozen=True)
class Recommended:
    """What a `generation_config.json` says of sampling."""

    settings: dict[str, Any] = field(default_factory=dict)  # by the names of `Settings`
    ignored: list[str] = field(default_factory=list)  # keys that would change the text, and have no place here


def read_recommended(checkpoint: Checkpoint) -> Recommended:
    """The settings in the file beside the tensors; none where there is no such file.

    Where `do_sample` is false, the temperature is 0: transformers then takes the likeliest token. Raises LlamaError,
    naming the key, for values that can't be.
    """
    paths = find_side_files(checkpoint, FILE)
    if not paths:
        return Recommended()
    path, values = paths[0], read_json(paths[0], "settings of generation")
    settings = {name: value for name in NAMES if (value := values.get(name)) is not None}
    settings = {name: None if value == OFF.get(name) else value for name, value in settings.items()}
    do_sample = values.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise LlamaError(f"{path}: do_sample is {shorten(do_sample)}, expected true or false")
    for name, value in settings.items():
        check_value(path, name, value)
    if do_sample is False:
        settings = {"temperature": 0, **{name: value for name, value in settings.items() if name != "temperature"}}
    ignored = [key for key, idle in FOREIGN.items() if values.get(key) is not None and values[key] not in idle]
    return Recommended(settings, ignored)


def check_value(path: Path, name: str, value: Any) -> None:
    try:
        Settings(**{name: value})
    except LlamaError as e:
        option = f"correct it, or remove the key{f' and set --{name}' * SETTINGS[name].on_command_line}"
        raise LlamaError(f"{path}: {e}: {option}") from None
