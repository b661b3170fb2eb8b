"""The settings in the files beside a tokenizer.json: names of its tokens, tokens that it lacks, the chat template, the
stop tokens.

Knows JSON, which may be anybody's; knows no tokenizer.
"""

import re
from pathlib import Path
from typing import Any

from .._util.files import read_json, read_text, unreadable_error
from ..errors import LlamaError, describe, shorten

CONFIG = "tokenizer_config.json"
_NAMED = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may have one without the other half of its character


def read_optional_json(path: Path, what: str) -> dict[str, Any]:
    """As `read_json`, but {} where there is no file."""
    return read_json(path, what) if path.exists() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the names of special tokens that older saves have in special_tokens_map.json.

    As in transformers, that file is read only where the first has no "added_tokens_decoder".
    """
    config = read_optional_json(folder / CONFIG, "a tokenizer's settings")
    if not config.get("extra_special_tokens"):  # the new name of the other
        config["extra_special_tokens"] = config.pop("additional_special_tokens", None)
    if "added_tokens_decoder" not in config:
        older = read_optional_json(folder / "special_tokens_map.json", "names of special tokens")
        extra, more = config["extra_special_tokens"], older.get("extra_special_tokens")
        config |= older
        if isinstance(extra, list) and isinstance(more, list):
            config["extra_special_tokens"] = extra + more
    extra = config["extra_special_tokens"]
    return config | extra if isinstance(extra, dict) else config


def list_added_tokens(folder: Path, config: dict[str, Any], in_file: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens that the settings add to those `in_file`, the "added_tokens" of the tokenizer.json, or state anew.

    They have its form, but for the ids, which are given by their order. Order and flags are those of transformers'
    PreTrainedTokenizerFast: tokens that are stated with an id, by id; then named ones; then other special ones.
    """
    path = folder / CONFIG
    named = {name: config[key] for key, name in read_named_tokens(path, config).items() if name}
    named |= _by_content(path, config["extra_special_tokens"])
    # Those of special_tokens_map.json count only where there are no others, and after the ids.
    late = {} if config["extra_special_tokens"] else _by_content(path, config.get("additional_special_tokens"))
    if "added_tokens_decoder" in config:
        stated = _read_decoder(path, config["added_tokens_decoder"])
    else:
        ids = read_optional_json(folder / "added_tokens.json", "ids of added tokens")
        if wrong := [name for name, token in ids.items() if type(token) is not int or not name]:
            raise LlamaError(f"{folder / 'added_tokens.json'}: {shorten(wrong[0])} has no id; expected ids by names")
        stated = {token: _make_token(path, name, normalized=name not in named) for name, token in ids.items()}
        stated |= {token["id"]: token for token in in_file}
    by_name = {token["content"]: token for token in stated.values()}
    special = [by_name.get(name) or _make_token(path, token) for name, token in (named | late).items()]
    return [by_id for _, by_id in sorted(stated.items())] + [token | {"special": True} for token in special]


def _by_content(path: Path, tokens: Any) -> dict[str, Any]:
    """The special tokens of a list by their names; {} for None, and for a dict, whose tokens have settings' names."""
    if tokens is not None and not isinstance(tokens, list | dict):
        raise LlamaError(f"{path}: the special tokens beside the named ones are {describe(tokens)}; expected a list")
    return {_make_token(path, token)["content"]: token for token in tokens} if isinstance(tokens, list) else {}


def _read_decoder(path: Path, decoder: Any) -> dict[int, dict[str, Any]]:
    """The "added_tokens_decoder" of a tokenizer_config.json."""
    if isinstance(decoder, dict) and all(key.isdecimal() and isinstance(v, dict) for key, v in decoder.items()):
        return {int(key): _make_token(path, token, normalized=True) for key, token in decoder.items()}
    raise LlamaError(f"{path}: added_tokens_decoder is {describe(decoder)}; expected a dict of tokens by their ids")


def _make_token(path: Path, token: Any, normalized: bool = False) -> dict[str, Any]:
    """An entry of "added_tokens", but for its id, of a name or of a dict. normalized: where the dict doesn't say."""
    token = {"content": token} if isinstance(token, str) else token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise LlamaError(f"{path}: an added token is {describe(token)}; expected a str, or a dict with 'content'")
    if _SURROGATE.search(token["content"]):
        raise LlamaError(f"{path}: the added token {shorten(token['content'])} has half a character, which no text has")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": False}
    if wrong := [flag for flag in flags if not isinstance(token.get(flag, False), bool)]:
        raise LlamaError(f"{path}: {wrong[0]} of {shorten(token['content'])} isn't true or false")
    return flags | {key: value for key, value in token.items() if key in flags or key == "content"}


def read_named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, with those of a dict "extra_special_tokens" -> the token.

    Other keys that end in "_token" are read if they are a str.

    path: of `config`, for messages.
    """
    named, extra = {}, config.get("extra_special_tokens")
    required = {*_NAMED, *(extra if isinstance(extra, dict) else ())}
    for key in dict.fromkeys((*_NAMED, *config)):
        value = config.get(key)
        match value:
            case str(name) | {"content": str(name)} if key in required or (key.endswith("_token") and name is value):
                named[key] = name
            case _ if key in required and value is not None:
                raise LlamaError(
                    f"{path}: {key} is {describe(value)}; expected a str, or a dict with the str 'content'"
                )
    return named


def read_split(path: Path, config: dict[str, Any]) -> bool:
    """Whether names of special tokens in a rendered template are text: "split_special_tokens".

    path: of `config`, for messages.
    """
    value = config.get("split_special_tokens", False)
    if not isinstance(value, bool):
        raise LlamaError(f"{path}: split_special_tokens is {shorten(value)}; expected true or false")
    return value


def read_chat_templates(folder: Path, config_path: Path, config: dict[str, Any]) -> dict[str, str]:
    """name -> template: "default", and others such as "tool_use", which is for dialogs with tools.

    Of chat_template.jinja and additional_chat_templates/NAME.jinja; else of the chat_template in tokenizer_config.json,
    `config`.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_template(path) for name, path in files.items()}
    match config.get("chat_template"):
        case None:
            return {}
        case str() as template:
            return {"default": template}
        case [*entries] if all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            templates = {entry["name"]: entry["template"] for entry in entries if entry.get("template") is not None}
            if all(isinstance(template, str) for template in templates.values()):
                return templates
    raise LlamaError(
        f"{config_path}: chat_template is {describe(config['chat_template'])}; expected a str, or a list of dicts with "
        "the strs 'name' and 'template'"
    )


def _read_template(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise unreadable_error(path, error) from None
    except UnicodeDecodeError as error:
        raise LlamaError(f"{path}: found what isn't UTF-8 ({error}); expected a Jinja template") from None


def read_stop_ids(path: Path, n_words: int) -> list[int]:
    """The "eos_token_id" of a configuration, one or several; [] if there is no file, or it has none."""
    value = read_optional_json(path, "settings").get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < n_words:
            raise LlamaError(f"{path}: eos_token_id is {describe(value)}; expected ids in 0..{n_words - 1}")
    return ids
