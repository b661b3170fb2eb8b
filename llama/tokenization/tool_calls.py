"""Calls of tools in what a model writes: their forms, one record each, which of them a model has, and calls in a text.

A form is data: the marks around calls, and the marks in a chat template or a vocabulary that tell of it. Knows
texts, of which the end may not have come yet; knows no tokens, no tensors and no model, and not whether a tool exists.
`tool_parser` reads whole messages.
"""

import json
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NoReturn

Call = tuple[str, str]  # a name and arguments


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    id: str
    name: str
    arguments: str  # the JSON text of an object, as the model wrote it


@dataclass(frozen=True)
class Layout:
    """One way to write calls: `open`, `begin`, calls with `separator` between them, one of `ends`.

    White space may be between all of them. Of an answer that ends after a whole call, the end may be missing.
    """

    open: str  # the mark before calls; "": there is none, and they are found where the answer begins
    begin: str = ""
    separator: str = ""  # "": there is a single call
    ends: tuple[str, ...] = ()
    is_whole: bool = False  # nothing follows in the answer
    name_ends: tuple[str, ...] = ()  # a call is NAME, the last of these marks and arguments; (): a JSON object


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes calls and reasoning, and how such a model is known."""

    name: str
    layouts: tuple[Layout, ...] = ()
    argument_keys: tuple[str, ...] = ("arguments",)  # of a call's JSON object: one of these has the arguments
    id_prefix: str = "call_"
    id_length: int = 24  # letters and digits after the prefix
    in_template: str = ""  # a template with this text has the form ...
    not_in_template: tuple[str, ...] = ()  # ... unless it has one of these
    in_vocabulary: str = ""  # the control token of the form
    reasoning: tuple[str, str] | None = None  # the marks around what a model thinks before it answers

    def make_id(self, random: Random) -> str:
        """An id for a call."""
        return self.id_prefix + "".join(random.choices(string.ascii_letters + string.digits, k=self.id_length))

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether the prompt of this text has written the mark before the reasoning, so that an answer is inside."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


_LLAMA_ENDS = "<|eom_id|>", "<|eot_id|>"
FORMS = (
    ToolForm(
        "hermes",  # and Qwen 2.5, Qwen 3
        (Layout("<tool_call>", ends=("</tool_call>",)),),
        in_template="<tool_call>",
        not_in_template=("<function=", "<arg_key>", "<invoke", "<tool_calls>"),  # other forms with the same mark
        in_vocabulary="<tool_call>",
    ),
    ToolForm(
        "mistral",
        (
            Layout("[TOOL_CALLS]", begin="[", separator=",", ends=("]",)),
            Layout("[TOOL_CALLS]", name_ends=("[CALL_ID]", "[ARGS]")),
        ),
        id_prefix="",
        id_length=9,
        in_template="[TOOL_CALLS]",
        in_vocabulary="[TOOL_CALLS]",
    ),
    ToolForm(
        "llama",  # 3.1 and later
        (
            Layout("", separator=";", ends=_LLAMA_ENDS, is_whole=True),
            Layout("<|python_tag|>", separator=";", ends=_LLAMA_ENDS, is_whole=True),
        ),
        argument_keys=("parameters", "arguments"),
        in_template='"parameters": dictionary',
        not_in_template=("<function=",),
        in_vocabulary="<|python_tag|>",
    ),
)
NO_FORM = ToolForm("none")
_REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def find_tool_form(source: object) -> ToolForm:
    """The form of the model that has this chat format, tokenizer, or text of a template.

    A template that writes calls tells; one that doesn't leaves it to the vocabulary.
    """
    template, names = _look_at(source)
    if "tool_call" in template.lower():
        form = next((form for form in FORMS if _is_in_template(form, template)), NO_FORM)
    else:
        form = next((form for form in FORMS if form.in_vocabulary in names), NO_FORM)
    marks = (pair for pair in _REASONING if all(mark in template or mark in names for mark in pair))
    return replace(form, reasoning=next(marks, None))


def _look_at(source: object) -> tuple[str, Collection[str]]:
    """The text of a source's template, "" if it has none, and the names of its control tokens."""
    if isinstance(source, str):
        return source, ()
    tokenizer: Any = getattr(source, "tokenizer", source)
    templates = (getattr(tokenizer, name, None) for name in ("tool_template", "chat_template"))
    return next(filter(None, templates), ""), tokenizer.special_tokens.keys()


def _is_in_template(form: ToolForm, template: str) -> bool:
    return form.in_template in template and not any(mark in template for mark in form.not_in_template)


def check_calls(calls: Iterable[ToolCall], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that are called, but are of none of `tools`: JSON schemas of functions, bare or in OpenAI's shape."""
    known = {tool.get("function", tool).get("name") for tool in tools}
    return [call.name for call in calls if call.name not in known]


# --- reading calls ------------------------------------------------------------------------------------------------


class NoCall(Exception):
    """The text is no call, whatever follows."""


class MoreNeeded(Exception):
    """What follows decides."""


class Value:
    """A JSON object in a text that may still grow: where it ends by its brackets. No part is read twice."""

    def __init__(self, start: int) -> None:
        self._place = start
        self.end: int | None = None
        self._depth = 0
        self._in_string = False

    def find_end(self, text: str) -> int:
        """Raises MoreNeeded where the text doesn't have it, and NoCall for what JSON can't have."""
        while self.end is None:
            found = (_IN_STRING if self._in_string else _NOT_BARE).search(text, self._place)
            if found is None or (found[0] == "\\" and found.end() == len(text)):
                self._place = len(text) if found is None else found.start()
                raise MoreNeeded
            if found[0] not in ('"\\' if self._in_string else '"{}[]'):
                raise NoCall
            self._place = found.end() + (self._in_string and found[0] == "\\")
            self._in_string ^= found[0] == '"'
            self._depth += (found[0] in "{[") - (found[0] in "}]")
            if self._depth <= 0 and found[0] in "}]":
                self.end = found.end()
        return self.end


@dataclass
class Progress:
    """What is known of a text that may hold calls, and grows."""

    values: dict[int, Value] = field(default_factory=dict)  # by their places
    calls: dict[Layout, tuple[int, list[Call]]] = field(default_factory=dict)  # where the next may be, and those before


_NOT_BARE = re.compile(r"[^-+.0-9eEtrufalsn \t\r\n:,]")  # outside of strings
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_SPACE = re.compile(r"[ \t\r\n]*")
_NAME = re.compile(r'[^\s\[\]{}()<>",:;]*')


class _Cursor:
    """A place in a text that may still grow."""

    def __init__(self, text: str, place: int, is_over: bool) -> None:
        self.text, self.place, self._is_over = text, place, is_over

    def skip(self) -> None:
        """Go past white space."""
        self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]  # it always matches

    def find(self, marks: Sequence[str]) -> str | None:
        """The one of `marks` that stands here. Raises MoreNeeded for the half of one."""
        for mark in marks:
            if self.text.startswith(mark, self.place):
                return mark
            if not self._is_over and mark.startswith(self.text[self.place : self.place + len(mark)]):
                raise MoreNeeded
        return None

    def take(self, *marks: str) -> bool:
        """Go past one of these, if it stands here, and the white space after it."""
        if (mark := self.find(marks)) is None:
            return False
        self.place += len(mark)
        self.skip()
        return True

    def expect(self, *marks: str) -> None:
        """As `take`, but there must be one."""
        if not self.take(*marks):
            raise NoCall

    def is_end(self) -> bool:
        """Whether the answer ends here."""
        if self.place == len(self.text) and not self._is_over:
            raise MoreNeeded
        return self.place == len(self.text)

    def word(self) -> str:
        """Go past a name, which something follows."""
        start, self.place = self.place, _NAME.match(self.text, self.place).end()  # type: ignore[union-attr]
        if self.is_end() or start == self.place:
            raise NoCall
        return self.text[start : self.place]

    def value(self, progress: Progress) -> str:
        """Go past the object that begins here."""
        start = self.place
        try:
            self.place = progress.values.setdefault(start, Value(start)).find_end(self.text)
        except MoreNeeded:
            if self._is_over:
                raise NoCall from None
            raise
        return self.text[start : self.place]


def read_calls(
    text: str, start: int, form: ToolForm, layouts: Sequence[Layout], progress: Progress, is_over: bool
) -> tuple[list[Call], int]:
    """The calls at `start` in one of the layouts, and where they end."""
    for layout in layouts:
        cursor = _Cursor(text, start, is_over)
        try:
            return _read_layout(cursor, form, layout, progress), cursor.place
        except NoCall:
            pass
    raise NoCall


def _read_layout(cursor: _Cursor, form: ToolForm, layout: Layout, progress: Progress) -> list[Call]:
    if layout in progress.calls:
        cursor.place, calls = progress.calls[layout]
        cursor.skip()
    else:
        calls = []
        cursor.skip()
        for mark in filter(None, (layout.open, layout.begin)):
            cursor.expect(mark)
    if layout.name_ends:
        return [_read_named(cursor, layout.name_ends, progress)]
    while True:
        call = _read_object(cursor, form, progress)
        cursor.skip()
        if not layout.separator or not cursor.take(layout.separator):
            break
        calls.append(call)
        progress.calls[layout] = cursor.place, calls
    end = cursor.find(layout.ends)
    if end is None and not cursor.is_end():
        raise NoCall
    cursor.place += len(end or "")
    if layout.is_whole:
        cursor.skip()
        if not cursor.is_end():
            raise NoCall
    return [*calls, call]


def _read_object(cursor: _Cursor, form: ToolForm, progress: Progress) -> Call:
    """A call that is a JSON object with a name and arguments."""
    start, known = cursor.place, ("name", *form.argument_keys, "type", "id")
    cursor.expect("{")
    if cursor.find([f'"{key}"' for key in known]) is None:  # known early, other objects needn't be held back
        raise NoCall
    cursor.place = start
    fields = _read_fields(cursor.value(progress))
    given = [fields[key] for key in form.argument_keys if key in fields]
    if fields.keys() - known or len(given) != 1 or not given[0].startswith("{"):
        raise NoCall
    return _read_name(fields.get("name", "")), given[0]


def _read_named(cursor: _Cursor, name_ends: Sequence[str], progress: Progress) -> Call:
    """A call that is a name, marks and arguments; before the last mark, others may stand with a word of their own."""
    name = cursor.word()
    for mark in name_ends[:-1]:
        if cursor.take(mark):
            cursor.word()
    cursor.expect(name_ends[-1])
    if cursor.find("{") is None:
        raise NoCall
    arguments = cursor.value(progress)
    _read_fields(arguments)
    return name, arguments


def _read_name(value: str) -> str:
    """The name that a JSON value is."""
    name = json.loads(value) if value.startswith('"') else ""
    if not name or not name.isprintable():  # half a surrogate isn't
        raise NoCall
    return str(name)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and its like, which are no JSON


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=str, parse_float=str)


def _read_fields(text: str) -> dict[str, str]:
    """The fields of a JSON object by their names, each as it is written. Raises NoCall where it isn't JSON."""
    fields: dict[str, str] = {}
    cursor = _Cursor(text, 0, is_over=True)
    cursor.expect("{")
    has_more = cursor.find('"') is not None
    try:
        while has_more:
            key, cursor.place = _DECODER.raw_decode(text, cursor.place)
            cursor.skip()
            cursor.expect(":")
            start = cursor.place
            _, cursor.place = _DECODER.raw_decode(text, start)
            if key in fields:
                raise NoCall
            fields[key] = text[start : cursor.place]
            cursor.skip()
            if (has_more := cursor.take(",")) and not cursor.find('"'):
                raise NoCall
    except (ValueError, RecursionError):
        raise NoCall from None
    if text[cursor.place :] != "}":
        raise NoCall
    return fields
