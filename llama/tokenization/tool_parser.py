"""What a model writes, in parts: content, reasoning and calls of tools; in pieces, as the text comes, or as a whole.

Knows texts and the forms of `tool_calls`; knows no tokens and no model. What isn't a valid call stays content, in full.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Literal, TypedDict

from ..tokenizer import Message
from .tool_calls import Layout, MoreNeeded, NoCall, Progress, ToolCall, ToolForm, read_calls


@dataclass(frozen=True)
class ParsedMessage:
    """What a model wrote, in parts."""

    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class CalledFunction(TypedDict):
    """The function that a call names, in OpenAI's shape."""

    name: str
    arguments: str


class CallEntry(TypedDict):
    """A call in OpenAI's shape."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Message, total=False):
    """A message that a model wrote. The keys beside role and content are there only where there is something."""

    reasoning_content: str
    tool_calls: list[CallEntry]


@dataclass(frozen=True)
class ContentPiece:
    """The content goes on."""

    text: str


@dataclass(frozen=True)
class ReasoningPiece:
    """The reasoning goes on."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins."""

    index: int  # among the message's calls
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentPiece:
    """The JSON text of a call's arguments goes on."""

    index: int
    text: str


Delta = ContentPiece | ReasoningPiece | CallStart | ArgumentPiece


def parse_message(
    text: str, form: ToolForm, with_tools: bool, *, in_reasoning: bool = False, random: Random | None = None
) -> ParsedMessage:
    """The parts of a whole message. Arguments are those of `MessageParser`."""
    parser = MessageParser(form, with_tools, in_reasoning=in_reasoning, random=random)
    return join_deltas([*parser.push(text), *parser.flush()])


def join_deltas(deltas: Iterable[Delta]) -> ParsedMessage:
    """The message that deltas make up."""
    deltas = list(deltas)
    starts = [delta for delta in deltas if isinstance(delta, CallStart)]
    arguments = ["" for _ in starts]
    for delta in deltas:
        if isinstance(delta, ArgumentPiece):
            arguments[delta.index] += delta.text
    calls = (ToolCall(start.id, start.name, text) for start, text in zip(starts, arguments, strict=True))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentPiece))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningPiece))
    return ParsedMessage(content, reasoning or None, tuple(calls))


def describe_message(parsed: ParsedMessage) -> AnswerMessage:
    """A message in OpenAI's shape."""
    message: AnswerMessage = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning_content is not None:
        message["reasoning_content"] = parsed.reasoning_content
    if parsed.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parsed.tool_calls
        ]
    return message


class MessageParser:
    """A message that comes in pieces of any length. The deltas, joined, are `parse_message` of the whole text.

    A call comes out when it is whole and known to be one; until then its text is held back, as is the half of a mark.
    White space around calls, and line ends around reasoning, belong to their layout, and are no content.
    """

    def __init__(
        self, form: ToolForm, with_tools: bool, *, in_reasoning: bool = False, random: Random | None = None
    ) -> None:
        """with_tools: look for calls. in_reasoning: the prompt has opened the reasoning: `form.opens_reasoning`.

        random: ids of calls are drawn from it; default: from the system's randomness.
        """
        self._form, self._random = form, random or SystemRandom()
        self._layouts = form.layouts if with_tools else ()
        self._stage = self._read_reasoning if in_reasoning else self._read_start
        self._held = ""  # what hasn't come out yet
        self._progress = Progress()  # of reading calls in what is held
        self._is_trimming = in_reasoning  # line ends that come next aren't of the text
        self._is_start = True  # the body begins with what is held
        self._has_content = False
        self._follows_call = False  # what is held follows a call
        self._calls = 0

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends inside of the reasoning."""
        return self._stage == self._read_reasoning

    def push(self, text: str) -> list[Delta]:
        """What is known of the message with this further text."""
        self._held += text
        return [*self._read(is_over=False)]

    def flush(self) -> list[Delta]:
        """The rest, where the message ends."""
        return [*self._read(is_over=True)]

    def _read(self, is_over: bool) -> Iterator[Delta]:
        stage = None
        while stage != self._stage:  # one that is done hands over to the next
            stage = self._stage
            yield from stage(is_over)

    def _take(self, length: int) -> str:
        """So much of what is held, which is held no longer."""
        taken, self._held = self._held[:length], self._held[length:]
        if taken:
            self._progress = Progress()
        return taken

    def _trim(self) -> None:
        if self._is_trimming:
            self._take(len(self._held) - len(self._held.lstrip("\n")))
            self._is_trimming = not self._held

    # --- the stages -------------------------------------------------------------------------------------------------

    def _read_start(self, is_over: bool) -> Iterator[Delta]:
        """Before it is known whether the message begins with reasoning."""
        text = self._held.lstrip()
        mark = self._form.reasoning[0] if self._form.reasoning else None
        if mark is not None and not is_over and len(text) < len(mark) and mark.startswith(text):
            return
        self._stage = self._read_body
        if mark is not None and text.startswith(mark):
            self._take(len(self._held) - len(text) + len(mark))
            self._stage, self._is_trimming = self._read_reasoning, True
        yield from ()

    def _read_reasoning(self, is_over: bool) -> Iterator[Delta]:
        assert self._form.reasoning is not None
        mark = self._form.reasoning[1]
        self._trim()
        end = self._held.find(mark)
        known = end if end >= 0 else len(self._held) if is_over else _find_half(self._held, [mark])
        if end >= 0 or not is_over:
            known = len(self._held[:known].rstrip("\n"))
        if text := self._take(known):
            yield ReasoningPiece(text)
        if end >= 0:
            self._take(end - known + len(mark))
            self._stage, self._is_trimming = self._read_body, True

    def _read_body(self, is_over: bool) -> Iterator[Delta]:
        """Content and calls."""
        self._trim()
        while self._held:
            start, layouts = self._find_layouts()
            if not layouts:
                yield from self._say_rest(is_over)
                return
            if not self._is_start:
                spoken = len(self._held[:start].rstrip())
                yield from self._say(spoken)
                start -= spoken
            try:
                calls, end = read_calls(self._held, start, self._form, layouts, self._progress, is_over)
            except MoreNeeded:
                return
            except NoCall:
                if self._is_start and not layouts[0].open:
                    self._is_start = False  # there may still be a mark
                else:
                    yield from self._say(start + len(layouts[0].open))
                continue
            self._take(end)
            self._follows_call, self._is_start = True, False
            for call in calls:
                yield from self._call(*call)

    def _find_layouts(self) -> tuple[int, Sequence[Layout]]:
        """Where calls may begin, and in which layouts; none if there is no such place."""
        bare = [layout for layout in self._layouts if not layout.open]
        if self._is_start and bare:
            return 0, bare
        self._is_start = False
        marks = {layout.open for layout in self._layouts if layout.open}
        places = {place: mark for mark in marks if (place := self._held.find(mark)) >= 0}
        start = min(places, default=-1)
        return start, [layout for layout in self._layouts if start >= 0 and layout.open == places[start]]

    def _say_rest(self, is_over: bool) -> Iterator[Delta]:
        """The content that can't be the beginning of a mark, or the space before one."""
        if is_over:
            if self._follows_call and self._held.isspace():
                self._take(len(self._held))
            yield from self._say(len(self._held))
        elif self._layouts:
            half = _find_half(self._held, [layout.open for layout in self._layouts if layout.open])
            yield from self._say(len(self._held[:half].rstrip()))
        else:
            yield from self._say(len(self._held))

    def _say(self, length: int) -> Iterator[Delta]:
        """So much of what is held is content."""
        text = self._take(length)
        if self._follows_call and not self._has_content:
            text = text.lstrip()
        if text:
            self._has_content, self._follows_call = True, False
            yield ContentPiece(text)

    def _call(self, name: str, arguments: str) -> Iterator[Delta]:
        index, self._calls = self._calls, self._calls + 1
        yield CallStart(index, self._form.make_id(self._random), name)
        yield ArgumentPiece(index, arguments)


def _find_half(text: str, marks: Iterable[str]) -> int:
    """Where the beginning of one of `marks` stands at the end of `text`; its end, if none does."""
    lengths = (n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
    return len(text) - max(lengths, default=0)
