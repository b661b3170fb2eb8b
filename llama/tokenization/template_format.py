"""Dialogs by the Jinja template that comes with a model.

What a user writes stays text: it can neither be nor become a control token, whatever the template does with it.

Knows no files, no tensors and no model.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Unpack, cast

from ..errors import LlamaError
from ..tokenizer import END_OF_TURN, Dialog
from .control_names import names_pattern
from .hf_tokenizer import HFTokenizer
from .messages import DialogOptions, UnusedWarnings, gather_options, join_parts, parts_of, read_messages
from .template_environment import CompiledTemplate, Parts, give
from .template_filters import Refusal
from .template_meter import TemplateLimit
from .template_text import GIVEN, JOINED, KIND, SPOKEN, WRITTEN, Text, join, origins_of

_ROLE = re.compile(r"[\w.-]+")  # what a role may be made of to be a part of a control token
_HAS_GIVEN = re.compile(b"[\x00\x03]")
_NOT_GIVEN = re.compile(b"[^\x00]+")
_KIND_ALONE = bytes(origin & KIND for origin in range(256))  # a table for bytes.translate
_TEXTS = "tools", "documents"  # options that bring a text of their own
_CONTINUED_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers marks the place


class TemplateFormat:
    """Dialogs by a model's chat template, as transformers' apply_chat_template encodes them.

    The template gets each message with all its keys. Each character that it renders is known to be its own or given
    (`template_text`): control tokens are made of its own alone, of roles that it joins to them, and of names in the
    assistant's content that aren't flagged special, such as </think>, since templates look for them there.
    """

    def __init__(self, tokenizer: HFTokenizer, now: datetime) -> None:
        """now: the date for templates that write it."""
        self.tokenizer = tokenizer
        self.now = now
        self.end_of_turn = tokenizer.special_tokens.get(END_OF_TURN, tokenizer.eos_id)  # the id that ends a message
        names = tokenizer.template_names
        self._pattern = names_pattern(names) if names else None
        self._controls = tokenizer.find_controls(names)
        self._spoken = names - tokenizer.flagged_special
        self._spoken_ids = {tokenizer.special_tokens[name] for name in self._spoken}
        self._compiled: dict[str, CompiledTemplate] = {}
        self._unused = UnusedWarnings("the model's chat template")

    def encode_dialog_prompt(self, dialog: Dialog, **options: Unpack[DialogOptions]) -> list[int]:
        """The ids of `dialog`, up to where the assistant's answer begins.

        Raises:
            LlamaError: the dialog is empty, or a message has no role or no text (it says which); there is no template,
                or it is broken, refuses the dialog, or takes more than 2 s or 256 MB.
        """
        return self.tokenizer.encode_parts(self.split(self.render(dialog, **options)))

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template takes, beside the messages; none if there is no template."""
        try:
            free = self._find_template(with_tools=False).free_names
        except LlamaError:  # told where a dialog is encoded
            return frozenset()
        return free - self.tokenizer.named_tokens.keys()

    # --- rendering --------------------------------------------------------------------------------------------------

    def render(self, dialog: Dialog, **options: Unpack[DialogOptions]) -> Text:
        """The text of a dialog. Errors are those of `encode_dialog_prompt`."""
        template = self._find_template(with_tools=options.get("tools") is not None)
        options = gather_options(options, template.names)
        messages = read_messages(dialog)
        self._warn_of_unused(template, messages, options)
        continued = bool(options.get("continue_final_message"))
        begins = options.get("add_generation_prompt")
        if continued:
            messages[-1] = _mark_place(messages[-1])
        variables = {
            **{name: Text(token, WRITTEN) for name, token in self.tokenizer.named_tokens.items()},
            **give(options.get("chat_template_kwargs") or {}, "chat_template_kwargs"),
            "tools": give(options.get("tools"), "tools"),
            "documents": give(options.get("documents"), "documents"),
            "add_generation_prompt": not continued if begins is None else begins,
        }
        text = self._render_parts(template, messages, variables)
        if not _HAS_GIVEN.search(origins_of(text).translate(_KIND_ALONE)) and _asks(messages):
            raise LlamaError("the chat template writes nothing of what the dialog says: it is none for dialogs")
        return _cut_at_place(text) if continued else text

    def _render_parts(
        self, template: CompiledTemplate, messages: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> Text:
        """Render. Content that came as a list of parts stays one if the template writes the parts, else is joined."""

        def render(given: Iterable[dict[str, Any]]) -> Text:
            return template.render({**variables, "messages": [self._give_message(message) for message in given]})

        parts = [
            text.strip() for message in messages if type(message.get("content")) is list for text in parts_of(message)
        ]
        if not parts:
            return render(messages)
        try:
            text = render(messages)
        except (Refusal, TemplateLimit):
            raise
        except LlamaError:
            return render(map(join_parts, messages))
        if all(part in text for part in parts):
            return text
        joined = render(map(join_parts, messages))
        return joined if sum(part in joined for part in parts) > sum(part in text for part in parts) else text

    def _give_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message as the template gets it, with the origin of each character."""
        role = message["role"]
        given = give(message, "a message")
        given["role"] = Text(role, JOINED) if _ROLE.fullmatch(role) else given["role"]
        if role == "assistant":
            match given.get("content"):
                case str(content):
                    given["content"] = self._mark_spoken(content)
                case list(parts):
                    given["content"] = [{**part, "text": self._mark_spoken(part["text"])} for part in parts]
        if type(given.get("content")) is list:
            given["content"] = Parts(given["content"])
        return given

    def _mark_spoken(self, content: str) -> Text:
        """The assistant's content, with the names in it that may become control tokens."""
        if not self._spoken or self._pattern is None:
            return cast(Text, content)
        pieces = self._pattern.split(str.__str__(content))
        return join(Text(piece, SPOKEN if piece in self._spoken else GIVEN) for piece in pieces)

    def _find_template(self, with_tools: bool) -> CompiledTemplate:
        source = (self.tokenizer.tool_template if with_tools else None) or self.tokenizer.chat_template
        if source is None:
            raise LlamaError(
                "the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so "
                "it isn't known how it was trained on dialogs; complete text with it, or add its template"
            )
        if source not in self._compiled:
            self._compiled[source] = CompiledTemplate(source, self.now)
        return self._compiled[source]

    def _warn_of_unused(
        self, template: CompiledTemplate, messages: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> None:
        """Say once for each thing that the template looks at no variable of this name, so that it is lost."""
        given = [name for name in _TEXTS if options.get(name)]
        given += (options.get("chat_template_kwargs") or {}).keys()
        unused = [name for name in given if name not in template.names]
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in template.source:
            unused.append("tool_calls")
        for name in unused:
            is_text = name in (*_TEXTS, "tool_calls")
            self._unused.tell(name, "what they say is lost" if is_text else "it has no effect")

    # --- text -> tokens ---------------------------------------------------------------------------------------------

    def find_tokens(self, text: Text) -> list[tuple[int, int, int]]:
        """(start, end, id) of each control token in a rendered text."""
        kinds = origins_of(text).translate(_KIND_ALONE)
        plain = str.__str__(text)
        found = []
        for region in _NOT_GIVEN.finditer(kinds):
            for start, end, token in self._controls.find(plain, *region.span()):
                inside = {*kinds[start:end]}
                allowed = {SPOKEN, WRITTEN, JOINED} if token in self._spoken_ids else {WRITTEN, JOINED}
                if inside <= allowed and inside != {JOINED}:
                    found.append((start, end, token))
        return found

    def split(self, text: Text) -> list[str | int]:
        """A rendered text as parts: the ids of control tokens, and plain text between them."""
        parts: list[str | int] = []
        place, plain = 0, str.__str__(text)
        for start, end, token in self.find_tokens(text):
            parts += [plain[place:start], token]
            place = end
        return [*parts, plain[place:]]


def _asks(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is a user's, and says something."""
    return messages[-1]["role"] == "user" and any(part.strip() for part in parts_of(messages[-1]))


def _mark_place(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark at the end of its content, where the answer goes on."""
    match message.get("content"):
        case str(content):
            return {**message, "content": content + _CONTINUED_HERE}
        case [*parts, last]:
            return {**message, "content": [*parts, {**last, "text": last["text"] + _CONTINUED_HERE}]}
    raise LlamaError("continue_final_message goes on with the last message's content, and it has none")


def _cut_at_place(text: Text) -> Text:
    """The text up to the mark."""
    before, mark, _ = text.rpartition(_CONTINUED_HERE.strip())
    if not mark:
        raise LlamaError("continue_final_message: the chat template doesn't write the end of the last message")
    # A template that strips the content has stripped the space after the mark too.
    return before if text.startswith(_CONTINUED_HERE, len(before)) else before.rstrip()
