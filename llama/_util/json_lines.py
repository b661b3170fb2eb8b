"""A line of JSON from a stranger's file -> a dict, or a LlamaError that says what is wrong with it.

Knows one line at a time.
"""

import json
import math
from typing import Any, NoReturn

from ..errors import LlamaError, describe


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises LlamaError."""
    try:
        value = json.loads(line.rstrip().decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as e:
        raise LlamaError(f"the line is not UTF-8: byte {e.start + 1} of it is 0x{line[e.start]:02x}") from None
    except json.JSONDecodeError as e:
        raise LlamaError(f"the line is not JSON: {e.msg} at character {e.pos + 1}") from None
    except (ValueError, RecursionError) as e:  # numbers that are none or too long; brackets without end
        raise LlamaError(f"the line is not JSON that can be read: {e}") from None
    if not isinstance(value, dict):
        raise LlamaError(f"the line is {describe(value)}, expected a JSON object")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is too large")
    return value
