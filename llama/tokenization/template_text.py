"""Text that knows, character by character, who wrote it: the template, or the dialog that it is given.

`Text` is a str whose methods keep that knowledge. Its memory is counted. Knows no Jinja, no tokens and no dialog.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, Self, SupportsIndex

from .template_meter import BYTES_OF_OBJECT, METER, Meter, check_number, check_room

# The origin of a character, a byte. What may become a control token: `find_tokens` in chat_template.py.
GIVEN = 0  # it came with the dialog: content, names, arguments of tools, documents
WRITTEN = 1  # the template's own: text, literals, names of tokens
JOINED = 2  # a role, or a number that the template counted: may be a part of a control token, but not all of it
SPOKEN = 3  # in the assistant's content, the name of a control token that isn't flagged special, such as </think>
KIND = 3  # mask of these four
LEARNT = 4  # flag: stands in {% generation %}

_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?(?P<spec>[#0\- +]*[0-9*]*(?:\.[0-9*]*)?)[hlL]?(?P<type>.)", re.DOTALL
)


class Text(str):
    """A str with the origin of each of its characters. What its methods return is Text too, with the right origins."""

    __slots__ = ("_meter", "_origins", "_size")
    _origins: bytes
    _meter: Meter | None
    _size: int

    def __new__(cls, text: str = "", origins: bytes | int = GIVEN) -> Self:
        """origins: of each character, or the one of all of them."""
        if type(text) is not str:
            text = str.__str__(text)
        size = BYTES_OF_OBJECT + len(text) * (2 if text.isascii() else 5)
        meter = METER.get(None)
        if meter is not None:
            meter.take(size)
        self = super().__new__(cls, text)
        self._origins = bytes((origins,)) * len(text) if isinstance(origins, int) else origins
        self._meter, self._size = meter, size
        return self

    def __del__(self) -> None:
        meter = getattr(self, "_meter", None)
        if meter is not None:
            meter.bytes -= self._size

    # str(x) and format(x) of a str are that str itself; join(), which Jinja calls most, makes a new one.
    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return _pad_by_spec(self, spec) if spec else self

    def __getitem__(self, key: SupportsIndex | slice) -> "Text":
        part = self._origins[key]
        return Text(str.__getitem__(self, key), part)

    def __iter__(self) -> Iterator[str]:
        meter = METER.get(None)
        for i in range(len(self)):
            if meter is not None:
                meter.step()
            yield self[i]

    def __add__(self, other: str) -> "Text":
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Text":
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Text":
        if not isinstance(count, int):
            return NotImplemented
        check_room(len(self) * count)
        return Text(str.__mul__(self, count), self._origins * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> "Text":
        return _format_percent(self, values)

    # --- methods that change characters -----------------------------------------------------------------------------

    def follow(self, changed: str) -> "Text":
        """`changed`, which is this text in other case, as Text. A character may have become several."""
        if len(changed) == len(self):
            return Text(changed, self._origins)
        origins, place = [], 0
        for character, origin in zip(str.__str__(self), self._origins, strict=True):
            forms = (character.lower(), character.upper(), character.title(), character.casefold(), character)
            form = next((form for form in forms if changed.startswith(form, place)), character)
            origins.append(bytes((origin,)) * len(form))
            place += len(form)
        return Text(changed, b"".join(origins))

    def lower(self) -> "Text":
        return self.follow(str.lower(self))

    def upper(self) -> "Text":
        return self.follow(str.upper(self))

    def title(self) -> "Text":
        return self.follow(str.title(self))

    def capitalize(self) -> "Text":
        return self.follow(str.capitalize(self))

    def casefold(self) -> "Text":
        return self.follow(str.casefold(self))

    def swapcase(self) -> "Text":
        return self.follow(str.swapcase(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Text":
        times = min(str.count(self, old), int(count)) if int(count) >= 0 else str.count(self, old)
        check_room(len(self) + times * len(new))
        changed = str.replace(self, old, new, times)
        added, origins = origins_of(new), self._origins
        if not any(origins) and not any(added):
            return Text(changed)
        kept, place = [], 0
        for number in range(times):
            end = str.find(self, old, place) if old else number
            kept.append(origins[place:end])
            place = end + len(old)
        return Text(changed, added.join([*kept, origins[place:]]))

    # --- methods that cut -------------------------------------------------------------------------------------------

    def strip(self, chars: str | None = None) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Text":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Text":
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> "Text":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str) -> "Text":
        return self[: len(str.removesuffix(self, suffix))]

    def _locate(self, pieces: Iterable[str], gap: int) -> list["Text"]:
        """The Texts of pieces that follow each other with at least `gap` characters in between."""
        found, place = [], 0
        for piece in pieces:
            place = str.find(self, piece, place)
            found.append(self[place : place + len(piece)])
            place += len(piece) + gap
        return found

    def _check_pieces(self, sep: str | None) -> None:
        """Raise TemplateLimit if the text could have too many pieces."""
        check_room(BYTES_OF_OBJECT * (str.count(self, sep) if sep else len(self) // 2))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Text"]:  # type: ignore[override]
        self._check_pieces(sep)
        return self._locate(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Text"]:  # type: ignore[override]
        self._check_pieces(sep)
        return self._locate(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list["Text"]:  # type: ignore[override]
        self._check_pieces("\n")
        lines = self._locate(str.splitlines(self, True), 0)
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        before, middle, _ = map(len, str.partition(self, sep))
        return self[:before], self[before : before + middle], self[before + middle :]

    def rpartition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        before, middle, _ = map(len, str.rpartition(self, sep))
        return self[:before], self[before : before + middle], self[before + middle :]

    # --- methods that put together ----------------------------------------------------------------------------------

    def join(self, pieces: Iterable[str]) -> "Text":
        return join(_between(self, list(pieces)))

    def _pad(self, pad: Callable[..., str], width: SupportsIndex, fill: str) -> "Text":
        check_number(width)
        padded = pad("0" * len(self), width, "1")
        before = padded.find("0") if self else len(padded)
        if not isinstance(fill, str) or len(fill) != 1:
            raise TypeError("the fill character must be exactly one character long")
        return join((Text(fill) * before, self, Text(fill) * (len(padded) - before - len(self))))

    def center(self, width: SupportsIndex, fillchar: str = " ") -> "Text":
        return self._pad(str.center, width, fillchar)

    def ljust(self, width: SupportsIndex, fillchar: str = " ") -> "Text":
        return self._pad(str.ljust, width, fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ") -> "Text":
        return self._pad(str.rjust, width, fillchar)

    def zfill(self, width: SupportsIndex) -> "Text":
        check_number(width)
        sign = self[: str.startswith(self, ("+", "-"))]
        return join((sign, "0" * max(0, int(width) - len(self)), self[len(sign) :]))


def origins_of(text: str) -> bytes:
    """The origin of each character. Those of a plain str were given."""
    return text._origins if isinstance(text, Text) else bytes(len(text))


def join(pieces: Iterable[str]) -> Text:
    """The pieces as one Text."""
    pieces = list(pieces)
    check_room(sum(map(len, pieces)))
    return Text("".join(pieces), b"".join(map(origins_of, pieces)))


def mark(text: str, flag: int) -> Text:
    """The Text with this flag for all of its characters."""
    return Text(text, bytes(origin | flag for origin in origins_of(text)))


def _between(separator: str, pieces: list[Any]) -> Iterator[str]:
    check_room(len(separator) * len(pieces))
    for i, piece in enumerate(pieces):
        if i:
            yield separator
        yield piece


# --- formatting: "%" and str.format ---------------------------------------------------------------------------------


def _pad_by_spec(text: Text, spec: str) -> Text:
    """format(text, spec): its fill, alignment, width and precision."""
    check_spec(spec)
    plain = str.__str__(text)
    formatted = str.__format__(plain, spec)
    kept = text
    if (dot := re.search(r"\.(\d+)s?$", spec)) is not None:
        kept = text[: int(dot[1])]
    extra = len(formatted) - len(kept)
    align = next((c for c in spec[1::-1] if c in "<>^"), "<")
    before = {"<": 0, ">": extra, "^": extra // 2}[align]
    return join((formatted[:before], kept, formatted[before + len(kept) :]))


def check_spec(spec: str) -> None:
    """Raise TemplateLimit if a number in a format is too large."""
    for digits in re.findall(r"\d+", spec):
        check_number(int(digits[:10]))


def _format_percent(template: Text, values: Any) -> Text:
    """template % values, piece by piece."""
    queue = iter(values if isinstance(values, tuple) else (values,))
    pieces: list[str] = []
    place = 0
    keyed = False
    for match in _CONVERSION.finditer(template):
        pieces.append(template[place : match.start()])
        place = match.end()
        if match["type"] == "%":
            pieces.append(template[place - 1 : place])
            continue
        spec, kind = match["spec"], match["type"]
        if "*" in spec:
            raise TypeError("a width of '*' isn't supported")
        check_spec(spec)
        if match["key"] is not None:
            value, keyed = values[match["key"]], True
        else:
            value = next(queue, queue)
            if value is queue:
                raise TypeError("not enough arguments for format string")
        pieces.append(_convert(f"%{spec}{kind}", value))
    rest = template[place:]
    if "%" in rest:
        raise ValueError("incomplete format")
    if not keyed and not isinstance(values, Mapping) and next(queue, queue) is not queue:
        raise TypeError("not all arguments converted during string formatting")
    return join([*pieces, rest])


def _convert(conversion: str, value: Any) -> str:
    """conversion % value, of one value."""
    if conversion[-1] == "s" and isinstance(value, str):
        text = value if isinstance(value, Text) else Text(value)
        width, _, precision = conversion[1:-1].partition(".")
        kept = text[: int(precision or 0)] if "." in conversion else text
        digits = re.search(r"[1-9]\d*", width)
        size = int(digits[0]) if digits else 0
        return kept.ljust(size) if "-" in width else kept.rjust(size)
    return Text(conversion % (value,), JOINED if type(value) is int else GIVEN)


def format_fields(template: Text, get_field: Callable[[str], Any]) -> Text:
    """str.format: literal pieces keep their origins. get_field: the value of a field by its name."""
    pieces: list[str] = []
    place = 0
    for literal, name, spec, conversion in Formatter().parse(str.__str__(template)):
        for character in literal:  # {{ and }} stand for one character each
            pieces.append(template[place])
            place += 1 + (character in "{}")
        if name is None:
            continue
        place += 1 + len(name) + (2 if conversion else 0)
        place += template[place] == ":"
        place += len(spec or "") + 1
        value = get_field(name)
        if conversion and not (conversion == "s" and isinstance(value, str)):
            value = Text(Formatter().convert_field(value, conversion))
        if spec and "{" in spec:
            spec = format_fields(Text(spec), get_field)
        check_spec(spec or "")
        if isinstance(value, str):
            pieces.append(format(value if isinstance(value, Text) else Text(value), spec or ""))
        else:
            pieces.append(Text(format(value, spec or ""), JOINED if type(value) is int else GIVEN))
    return join(pieces)
