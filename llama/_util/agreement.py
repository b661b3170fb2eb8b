"""What a call's arguments are, in short, so that ranks can compare theirs.

Knows plain values; knows no rank and no model.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from numbers import Number


def digest(value: object) -> str:
    """The same for equal values in all processes. Functions count as equal if they have one name."""
    return hashlib.blake2b(normalize(value).encode(), digest_size=16).hexdigest()


def normalize(value: object) -> str:
    if value is None or isinstance(value, str | bytes | Number):
        return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        return normalize({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{normalize(k)}:{normalize(v)}" for k, v in value.items())) + "}"
    if isinstance(value, Set):  # its order differs between processes
        return "{" + ",".join(sorted(map(normalize, value))) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(normalize, value)) + "]"
    return getattr(value, "__qualname__", type(value).__qualname__)
