"""The settings in the files beside a tokenizer.json: names of its tokens, the chat template, the stop tokens.

Knows JSON, which may be anybody's; knows no tokenizer.
"""

from pathlib import Path
from typing import Any

from .._util.files import read_json, unreadable_error
from ..errors import LlamaError, describe

_NAMED = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"


def read_optional_json(path: Path, what: str) -> dict[str, Any]:
    """As `read_json`, but {} where there is no file."""
    return read_json(path, what) if path.exists() else {}


def read_named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on -> the token. Other keys that end in "_token" are read if they are a str.

    path: of `config`, for messages.
    """
    named = {}
    for key, value in config.items():
        match value:
            case str(name) | {"content": str(name)} if key in _NAMED or (key.endswith("_token") and name is value):
                named[key] = name
            case _ if key in _NAMED and value is not None:
                raise LlamaError(
                    f"{path}: {key} is {describe(value)}; expected a str, or a dict with the str 'content'"
                )
    return named


def read_chat_template(path: Path, config_path: Path, config: dict[str, Any]) -> str | None:
    """The template in the file `path`; else that in tokenizer_config.json, where "default" is taken of several."""
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise unreadable_error(path, error) from None
        except ValueError as error:
            raise LlamaError(f"{path}: found what isn't UTF-8 ({error}); expected a Jinja template") from None
    match config.get("chat_template"):
        case None | str() as template:
            return template
        case [*entries] if all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            template = {entry["name"]: entry.get("template") for entry in entries}.get("default")
            if template is None or isinstance(template, str):
                return template
    raise LlamaError(
        f"{config_path}: chat_template is {describe(config['chat_template'])}; expected a str, or a list of dicts with "
        "the strs 'name' and 'template'"
    )


def read_stop_ids(path: Path, n_words: int) -> list[int]:
    """The "eos_token_id" of a configuration, one or several; [] if there is no file, or it has none."""
    value = read_optional_json(path, "settings").get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < n_words:
            raise LlamaError(f"{path}: eos_token_id is {describe(value)}; expected ids in 0..{n_words - 1}")
    return ids
