"""Dialogs as the model's own chat template writes them: a Jinja template that came with the model.

`TemplateFormat` is to `HFTokenizer` what `ChatFormat` is to `Tokenizer`; `formatter` gives the one that fits. What a
user writes stays text: it can neither be nor become a control token.

Knows no files, no tensors and no model.
"""

import json
from collections.abc import Iterable, Set
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import LlamaError, shorten, to_one_line
from ..tokenizer import ROLES, ChatFormat, Dialog, Message, Tokenizer, field_of
from .hf_tokenizer import HFTokenizer, names_pattern, without_surrogates

_STAND_INS = range(0xF0000, 0x110000)  # Unicode's private use, planes 15 and 16


class TemplateFormat:
    """Dialogs by a model's chat template, as transformers' apply_chat_template encodes them.

    The template sees `role` and `content` of each message, and of the content not the names of control tokens: where
    one stands, and where a piece of one stands at an edge, it sees a character of Unicode's private use. So it can't
    take a message's text for its own. In the assistant's messages it sees the names that aren't flagged special, since
    templates look there for such as </think>: these become tokens.
    """

    def __init__(self, tokenizer: HFTokenizer, now: datetime) -> None:
        """`now` is what templates that write the date take for today."""
        self.tokenizer = tokenizer
        self.now = now
        self._pattern = names_pattern(tokenizer.special_tokens.keys()) if tokenizer.special_tokens else None
        self._all = _Edges(tokenizer.special_tokens.keys())
        self._flagged = _Edges(tokenizer.flagged_special)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The ids of `dialog`, up to where the assistant's answer begins.

        Raises:
            LlamaError: the dialog is empty, a message has an unknown role or no text for content (it says which); there
                is no template, or it is broken, or refuses the dialog.
        """
        if not dialog:
            raise LlamaError("the dialog is empty; expected at least one message")
        messages = []
        for number, message in enumerate(dialog, start=1):
            try:
                messages.append(_checked(message))
            except LlamaError as error:
                raise LlamaError(f"message {number} of {len(dialog)}: {error}") from None
        stand_ins = _StandIns([self.tokenizer.chat_template or "", *(content for _, content in messages)])
        hidden = [{"role": role, "content": self._hidden(role, content, stand_ins)} for role, content in messages]
        try:
            text = self._render(hidden)
        except LlamaError as error:
            raise LlamaError(stand_ins.put_back(str(error))) from None
        parts = self.tokenizer.split(text, self.tokenizer.special_tokens.keys())
        return self.tokenizer.encode_parts(
            part if isinstance(part, int) else stand_ins.put_back(part) for part in parts
        )

    def _render(self, messages: list[dict[str, str]]) -> str:
        template = self._template
        try:
            return template.render(
                **self.tokenizer.named_tokens,
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except LlamaError:
            raise
        except Exception as error:  # the template is a program, and may fail in any way a program can
            raise LlamaError(f"the chat template fails ({type(error).__name__}: {to_one_line(error)})") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self.tokenizer.chat_template
        if source is None:
            raise LlamaError(
                "the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so "
                "it isn't known how it was trained on dialogs; complete text with it, or add its template"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self.now.strftime
        try:
            return environment.from_string(source)
        except Exception as error:  # mostly TemplateSyntaxError; RecursionError and others for what was made to harm
            raise LlamaError(f"the chat template isn't Jinja that can be read ({to_one_line(error)})") from None

    def _hidden(self, role: str, content: str, stand_ins: "_StandIns") -> str:
        """`content` with stand-ins for control tokens' names, and for their pieces at the edges."""
        if self._pattern is None:
            return content
        hidden = self._flagged if role == "assistant" else self._all
        parts = self._pattern.split(content)
        for i, part in enumerate(parts):
            if i % 2 == 0:
                # A template may cut the text at a name that it sees, so that every part has two edges.
                parts[i] = hidden.hide(part, stand_ins)
            elif part in hidden.names:
                parts[i] = stand_ins.take(part)
        return "".join(parts)


class _Edges:
    """What of some names could be completed by text that comes before or after."""

    def __init__(self, names: Set[str]) -> None:
        self.names = names
        self._starts = {name[:i].rstrip() for name in names for i in range(1, len(name))} - {""}
        self._ends = {name[i:].lstrip() for name in names for i in range(1, len(name))} - {""}
        self._longest = max(map(len, names), default=0)

    def hide(self, text: str, stand_ins: "_StandIns") -> str:
        """`text` with stand-ins for the start of a name that it ends with, and the end of one that it starts with.

        White space around is left out of both, because templates strip it.
        """
        end = len(text.rstrip())
        for i in range(max(0, end - self._longest), end):  # the longest first
            if text[i:end] in self._starts:
                text = text[:i] + stand_ins.take(text[i:end]) + text[end:]
                break
        start = len(text) - len(text.lstrip())
        for i in range(min(len(text), start + self._longest), start, -1):
            if text[start:i] in self._ends:
                return text[:start] + stand_ins.take(text[start:i]) + text[i:]
        return text


class _StandIns:
    """Characters that stand for texts until the template is done; each is in none of the `taken` texts."""

    def __init__(self, taken: Iterable[str]) -> None:
        used = set().union(*taken)
        self._free = (chr(code) for code in _STAND_INS if chr(code) not in used)
        self._of: dict[str, str] = {}

    def take(self, text: str) -> str:
        if text not in self._of:
            stand_in = next(self._free, None)
            if stand_in is None:
                raise LlamaError("the dialog has every character of Unicode's private use; remove some")
            self._of[text] = stand_in
        return self._of[text]

    def put_back(self, text: str) -> str:
        return text.translate({ord(stand_in): original for original, stand_in in self._of.items()})


class _Generation(Extension):
    """{% generation %} .. {% endgeneration %}, with which templates mark what is trained on; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def formatter(tokenizer: Tokenizer | HFTokenizer, now: datetime) -> ChatFormat | TemplateFormat:
    """What writes dialogs for the model of `tokenizer`; `now` is today for templates that write the date."""
    return ChatFormat(tokenizer) if isinstance(tokenizer, Tokenizer) else TemplateFormat(tokenizer, now)


def _checked(message: Message) -> tuple[str, str]:
    """Role and content of `message`, in characters that a tokenizer can take."""
    role, content = field_of(message, "role"), field_of(message, "content")
    if role not in ROLES:
        raise LlamaError(f"unknown role {shorten(role)}; known roles are {', '.join(ROLES)}")
    return role, without_surrogates(content)


def _raise_exception(message: object) -> NoReturn:
    raise LlamaError(f"the chat template refuses the dialog: {to_one_line(message)}")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
