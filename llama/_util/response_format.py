"""The forms of `response_format`: OpenAI's, and three more.

Knows plain values; knows no grammar, which `engine/grammar.py` makes of them.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import LlamaError, shorten
from .validate import suggest

MOST_BYTES = 1 << 16  # of a format, written as JSON
SCHEMA_KEYS = ("name", "description", "schema", "strict")  # of OpenAI's "json_schema"


def is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def is_list_of_texts(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(is_text, value))


def is_named_schema(value: object) -> bool:
    """Whether it is an object with a schema. Raises LlamaError for a key that it can't have, or a wrong value."""
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
        return False
    check_keys("response_format's json_schema", value, SCHEMA_KEYS)
    for key, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(value.get(key), kind | None):
            expected = "true or false" if kind is bool else "a text"
            raise LlamaError(f"response_format's json_schema has {key} {shorten(value[key])}, expected {expected}")
    return True


# By type: the keys that a format has beside "type". Each is required, and has a check and what it expects.
FORMS: dict[str, dict[str, tuple[Callable[[object], bool], str]]] = {
    "text": {},
    "json_object": {},
    "json_schema": {"json_schema": (is_named_schema, 'an object with a JSON schema as its "schema"')},
    "regex": {"regex": (is_text, "a regular expression")},
    "choice": {"choice": (is_list_of_texts, "a list of texts, at least one and none of them empty")},
    "grammar": {"grammar": (is_text, "a grammar in Lark's syntax")},
}
DESCRIPTION = f'{{"type": TYPE, ...}} with one of the types {", ".join(FORMS)}'


def is_response_format(value: Any) -> bool:
    """Whether it is a format. Raises LlamaError where it nearly is one: for a type, key or value that none has."""
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return False
    if kind not in FORMS:
        known = f"expected one of {', '.join(FORMS)}"
        raise LlamaError(f"response_format has type {shorten(kind)}, {known}{suggest(kind, FORMS)}")
    check_keys(f"response_format of type {kind}", value, ("type", *FORMS[kind]))
    for key, (is_valid, expected) in FORMS[kind].items():
        if not is_valid(value.get(key)):
            found = f"{key} {shorten(value[key])}" if key in value else f"no {key}"
            raise LlamaError(f"response_format of type {kind} has {found}, expected {expected}")
    check_size(value)
    return True


def check_keys(what: str, value: dict[Any, Any], known: Sequence[str]) -> None:
    if unknown := [key for key in value if key not in known]:
        raise LlamaError(f"{what} has the unknown key {shorten(unknown[0])}, known are {', '.join(known)}")


def check_size(value: dict[str, Any]) -> None:
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as e:
        raise LlamaError(f"response_format can't be written as JSON: {e}") from None
    if size > MOST_BYTES:
        raise LlamaError(f"response_format has {size} bytes as JSON, expected at most {MOST_BYTES}")
