"""A JSON configuration whose values are checked as they are read: `Config`.

Knows types and ranges; knows no key and no file format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LlamaError, shorten
from ..rotary import LARGEST


class Config:
    """A JSON configuration whose values are checked as they are read; each check raises LlamaError."""

    path: Path  # the file it came from, for messages
    values: Mapping[str, Any]  # by key
    defaults: Mapping[str, Any]  # values of keys that it lacks
    spelling: Mapping[str, str]  # what the file calls a key, where that differs

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        spelling: Mapping[str, str] | None = None,
    ):
        self.path, self.values, self.defaults, self.spelling = path, values, defaults, spelling or {}

    def error(self, key: str, value: Any, expected: str) -> LlamaError:
        return LlamaError(f"{self.path}: {self.spelling.get(key, key)} is {shorten(value)}, expected {expected}")

    def value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def count(self, key: str) -> int:
        if key not in self.values and key not in self.defaults:
            name = self.spelling.get(key, key)
            raise LlamaError(f"{self.path}: missing key {name}; expected a whole number of at least 1")
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LARGEST:
            raise self.error(key, value, "a whole number of at least 1")
        return value

    def optional_count(self, key: str) -> int | None:
        return None if self.value(key) is None else self.count(key)

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
            raise self.error(key, value, "a positive number")
        return value

    def flag(self, key: str) -> bool:
        value = self.value(key, False)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value
