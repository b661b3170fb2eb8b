"""The filters and tests of templates, whose calls are counted, and whose texts keep who wrote them.

Knows Jinja's own filters; knows no tokens and no dialog.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2.filters import FILTERS, do_mark_safe, do_title, make_attrgetter
from jinja2.tests import TESTS

from ..errors import LlamaError, to_one_line
from .template_meter import BYTES_OF_ENTRY, BYTES_OF_ITEM, METER, TemplateLimit, check_number, weigh
from .template_text import GIVEN, JOINED, KIND, Text, join, origins_of

LARGEST_BITS = 4096  # of an integer
# Filters whose work doesn't go deep into their argument, or that refer to it later, one entry at a time.
_SHALLOW = {"length", "count", "first", "last", "default", "d", "map", "select", "reject", "selectattr", "rejectattr"}
_SHALLOW |= {"list", "batch", "slice", "items", "reverse", "attr"}
_COST = {"title": 200, "wordcount": 200}  # of a character, where a filter makes a list of all words
# Filters that make HTML or are random, for which no template of a dialog has a use.
_LEFT_OUT = {"e", "escape", "forceescape", "urlize", "urlencode", "striptags", "xmlattr", "pprint", "random"}
_LEFT_OUT |= {"wordwrap", "filesizeformat"}


class Refusal(LlamaError):
    """The template itself says, by raise_exception, that it doesn't take the dialog."""


class GivenInteger(int):
    """An integer that came with the dialog, or was made of what did: its digits are no part of a control token."""


class _Safe(Text):
    """What the filter "safe" gives. Jinja escapes what is added to it; here that isn't done, but told."""

    def _refuse(self, _: Any) -> NoReturn:
        raise TypeError("a text marked safe is added to, and what is added would be escaped, which isn't supported")

    __add__ = __radd__ = __mod__ = _refuse


def make_filters(to_text: Callable[[Any], Text]) -> dict[str, Any]:
    """All filters. to_text: makes a value what is printed of it."""
    own = {"join": _join, "tojson": _tojson, "indent": _indent, "title": _title, "sum": _sum, "safe": _mark_safe}
    own |= {"replace": _replace, "string": to_text, "round": _round}
    return {name: _count_filter(name, one) for name, one in (FILTERS | own).items() if name not in _LEFT_OUT}


def make_tests() -> dict[str, Any]:
    """All tests."""
    return {name: _count_test(test) for name, test in TESTS.items()}


def check_integer(value: int) -> None:
    if value.bit_length() > LARGEST_BITS:
        raise TemplateLimit("the chat template makes a number that is too large")


def _count_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, whose calls are counted, whose arguments are checked, and whose text is Text."""
    first = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        METER.get().step()
        args = tuple(Text(value) if type(value) is str else value for value in args)
        value, rest = args[first], (*args[first + 1 :], *options.values())
        weigh((rest, () if name in _SHALLOW else value))
        if hasattr(value, "__len__"):
            METER.get().step(_COST.get(name, 1) * len(value))
        if name not in ("default", "d"):
            for argument in rest:
                check_number(argument)
        result = function(*args, **options)
        if type(result) is int and name not in ("length", "count", "wordcount"):
            check_integer(result)
            if isinstance(value, GivenInteger | float) or (isinstance(value, str) and not all(origins_of(value))):
                return GivenInteger(result)
        if isinstance(result, list | dict | str):
            METER.get().step(len(result))
        if isinstance(result, list):
            METER.get().take((BYTES_OF_ENTRY if isinstance(value, list) else BYTES_OF_ITEM) * len(result))
        return Text(result) if type(result) is str else result

    return counted


def _count_test(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def counted(*args: Any) -> Any:
        METER.get().step()
        if len(args) > 1:
            weigh(args[hasattr(function, "jinja_pass_arg") :])
        return function(*args)

    return counted


def raise_exception(message: object) -> NoReturn:
    weigh(message)
    raise Refusal(f"the chat template refuses the dialog: {to_one_line(message)}")


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: Any = None) -> Text:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return environment.to_text(d).join([environment.to_text(one) for one in value])


@jinja2.pass_environment
def _replace(environment: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Text:
    s, old, new = map(environment.to_text, (s, old, new))
    return s.replace(old, new, -1 if count is None else count)


def _mark_safe(value: Any) -> _Safe:
    return _Safe(do_mark_safe(value), origins_of(value) if isinstance(value, str) else GIVEN)


def _title(s: Text) -> Text:
    return s.follow(do_title(str.__str__(s)))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    indention = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()
    pieces: list[str] = []
    for number, line in enumerate(lines):
        pieces += ["\n"] * (number > 0)
        pieces += [indention] * (first if number == 0 else bool(line) or blank)
        pieces.append(line)
    return join(pieces)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    for one in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
        start = environment.call_binop(None, "+", start, one)
    return start


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 300:
        raise TypeError(f"round to {precision} digits isn't supported")
    return FILTERS["round"](value, precision, method)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> Text:
    """JSON without escapes for HTML, which Jinja's own filter makes. Texts in it keep their origins."""
    for number in (indent, len(indent) if isinstance(indent, str) else 0):
        if isinstance(number, int) and number > 100:
            raise TypeError(f"an indent of {number} isn't supported")
    stands_for: dict[str, str] = {}
    nonce = secrets.token_hex(8)

    def hide(one: Any) -> Any:
        """`one` with a placeholder for each text that isn't wholly given."""
        if isinstance(one, Mapping):
            return {key: hide(inner) for key, inner in one.items()}
        if isinstance(one, list | tuple):
            return [hide(inner) for inner in one]
        if isinstance(one, str) and any(origin & KIND not in (GIVEN, JOINED) for origin in origins_of(one)):
            stands_for[name := str(len(stands_for))] = one
            return f"{nonce}{name}."
        return one

    options: dict[str, Any] = {"ensure_ascii": bool(ensure_ascii)}
    text = json.dumps(hide(value), indent=indent, separators=separators, sort_keys=bool(sort_keys), **options)
    pieces: list[str] = []
    before, *following = text.split(nonce)
    for piece in following:
        name, _, rest = piece.partition(".")
        for character, origin in zip(stands_for[name], origins_of(stands_for[name]), strict=True):
            pieces.append(Text(json.dumps(character, **options)[1:-1], origin))
        pieces.append(rest)
    return join([before, *pieces])
