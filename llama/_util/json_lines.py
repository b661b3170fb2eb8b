"""One line of a file of JSON lines -> a dict, or a LlamaError that says what is wrong with the line.

Knows no file and no field.
"""

import json
import math
from typing import Any, NoReturn

from ..errors import LlamaError, describe


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line of UTF-8. Raises LlamaError for anything else, such as NaN."""
    try:
        text = line.rstrip().decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_finite)
    except UnicodeDecodeError as e:
        raise LlamaError(f"the line is not UTF-8: byte {e.start + 1} of it is 0x{line[e.start]:02x}") from None
    except json.JSONDecodeError as e:
        raise LlamaError(f"the line is not JSON: {e.msg} at character {e.pos + 1}") from None
    except (ValueError, RecursionError) as e:  # a number that is not finite or has too many digits; too many brackets
        raise LlamaError(f"the line is not JSON that can be read: {e}") from None
    if not isinstance(value, dict):
        raise LlamaError(f"the line is {describe(value)}, expected a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _parse_finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is too large")
    return value
