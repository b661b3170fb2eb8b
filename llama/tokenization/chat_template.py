"""Dialogs by the Jinja template that comes with a model.

`TemplateFormat` is to `HFTokenizer` what `ChatFormat` is to `Tokenizer`; `make_formatter` chooses. What a user writes
stays text: it can neither be nor become a control token.

Knows no files, no tensors and no model.
"""

import json
from collections.abc import Iterable, Set
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import LlamaError, shorten, to_one_line
from ..tokenizer import END_OF_TURN, ROLES, ChatFormat, Dialog, Message, Tokenizer, get_field
from .hf_tokenizer import HFTokenizer, names_pattern, replace_surrogates
from .protocol import AnyChatFormat, AnyTokenizer

_STAND_INS = range(0xF0000, 0x110000)  # Unicode's private use, planes 15 and 16


class TemplateFormat:
    """Dialogs by a model's chat template, as transformers' apply_chat_template encodes them.

    The template gets `role` and `content` of each message. In the content, each name of a control token, and each piece
    of one at an edge, is replaced by a character of Unicode's private use, a stand-in, so that what a user writes can't
    become a control token. In the assistant's messages, the names that aren't flagged special stay, since templates
    look there for names such as </think>: these become tokens.
    """

    def __init__(self, tokenizer: HFTokenizer, now: datetime) -> None:
        """now: the date for templates that write it."""
        self.tokenizer = tokenizer
        self.now = now
        self.end_of_turn = tokenizer.special_tokens.get(END_OF_TURN, tokenizer.eos_id)  # the id that ends a message
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
                messages.append(_check_message(message))
            except LlamaError as error:
                raise LlamaError(f"message {number} of {len(dialog)}: {error}") from None
        stand_ins = _StandIns([self.tokenizer.chat_template or "", *(content for _, content in messages)])
        safe = [{"role": role, "content": self._hide_names(role, content, stand_ins)} for role, content in messages]
        try:
            text = self._render(safe)
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
        except Exception as error:  # mostly TemplateSyntaxError; RecursionError and others for hostile templates
            raise LlamaError(f"the chat template isn't Jinja that can be read ({to_one_line(error)})") from None

    def _hide_names(self, role: str, content: str, stand_ins: "_StandIns") -> str:
        """Replace the names of control tokens in `content`, and their pieces at its edges, by stand-ins."""
        if self._pattern is None:
            return content
        edges = self._flagged if role == "assistant" else self._all
        parts = self._pattern.split(content)
        for i, part in enumerate(parts):
            if i % 2 == 0:
                # A template may cut the text at a name that stayed, so every part has two edges.
                parts[i] = edges.hide(part, stand_ins)
            elif part in edges.names:
                parts[i] = stand_ins.take(part)
        return "".join(parts)


class _Edges:
    """The pieces of some names that could be completed by the text before or after."""

    def __init__(self, names: Set[str]) -> None:
        self.names = names
        self._starts = {name[:i].rstrip() for name in names for i in range(1, len(name))} - {""}
        self._ends = {name[i:].lstrip() for name in names for i in range(1, len(name))} - {""}
        self._longest = max(map(len, names), default=0)

    def hide(self, text: str, stand_ins: "_StandIns") -> str:
        """Replace the start of a name at the end of `text`, and the end of a name at its start, by stand-ins.

        White space around `text` is passed over, because templates strip it.
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
    """Characters that stand for texts while a template is rendered; none of them is in `texts`."""

    def __init__(self, texts: Iterable[str]) -> None:
        used = set().union(*texts)
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
    """{% generation %} .. {% endgeneration %}, which mark what a model is trained on; they have no effect here."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def make_formatter(tokenizer: AnyTokenizer, now: datetime) -> AnyChatFormat:
    """The chat format of a tokenizer's model: its template, or Llama 3's. now: see TemplateFormat."""
    if isinstance(tokenizer, HFTokenizer):
        return TemplateFormat(tokenizer, now)
    return ChatFormat(cast(Tokenizer, tokenizer))  # any other tokenizer has Llama 3's control tokens


def _check_message(message: Message) -> tuple[str, str]:
    """(role, content) of `message`, without surrogates. Raises LlamaError for what isn't a message."""
    role, content = get_field(message, "role"), get_field(message, "content")
    if role not in ROLES:
        raise LlamaError(f"unknown role {shorten(role)}; known roles are {', '.join(ROLES)}")
    return role, replace_surrogates(content)


def _raise_exception(message: object) -> NoReturn:
    raise LlamaError(f"the chat template refuses the dialog: {to_one_line(message)}")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without escapes for HTML, which Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
