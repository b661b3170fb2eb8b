"""A dialog as callers give it: what may be asked for beside its messages, and which messages there may be.

Knows plain values; knows no tokens and no template.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypedDict, cast

from .._util.ranks import is_main_process
from .._util.validate import check_dialog, suggest
from ..errors import LlamaError, describe, shorten
from ..settings import CALL_OPTIONS, NAMES

_REASONING = "reasoning_content", "thinking", "reasoning"  # names of the same, as transformers reads them
_CONTINUED = "content"  # the field that continue_final_message=True goes on with


class DialogOptions(TypedDict, total=False):
    """What a dialog's prompt may be given by name, as transformers' apply_chat_template takes it."""

    tools: Sequence[Mapping[str, Any]] | None  # JSON schemas of functions that the model may call
    documents: Sequence[Mapping[str, Any]] | None  # for templates that write texts to answer from
    add_generation_prompt: bool | None  # end where the assistant's answer begins; default: yes, unless one is continued
    continue_final_message: bool  # end inside the last message, so that the answer goes on with it
    chat_template_kwargs: Mapping[str, Any] | None  # other variables of the template, such as enable_thinking


DIALOG_OPTIONS = frozenset(DialogOptions.__annotations__)


def split_options(
    options: Mapping[str, Any], find_variables: Callable[[], Set[str]]
) -> tuple[DialogOptions, dict[str, Any]]:
    """(what is asked for the dialog, the other options). find_variables: gives the names that the template knows.

    Raises LlamaError for a name that is neither.
    """
    known = DIALOG_OPTIONS | CALL_OPTIONS | NAMES
    unknown = options.keys() - known
    names = DIALOG_OPTIONS | (unknown & find_variables() if unknown else frozenset())
    if wrong := sorted(unknown - names):
        close = suggest(wrong[0], known | find_variables())
        raise LlamaError(f"{shorten(wrong[0])} is no setting: known are {', '.join(sorted(known))}{close}")
    asked = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    return cast(DialogOptions, asked), others


class UnusedWarnings:
    """Warns of what a chat format doesn't use, on the main process, and once of each thing."""

    def __init__(self, chat_format: str) -> None:
        """chat_format: its name in the messages."""
        self._format = chat_format
        self._told: set[str] = set()

    def tell(self, name: str, lost: str = "it has no effect") -> None:
        """lost: what comes of it."""
        if name not in self._told:
            self._told.add(name)
            if is_main_process():
                warnings.warn(f"{self._format} doesn't use {name}: {lost}", stacklevel=5)


def gather_options(options: Mapping[str, Any], variables: Set[str]) -> DialogOptions:
    """The options, with those that are variables of the template, such as enable_thinking, in chat_template_kwargs.

    Raises LlamaError for an option that a dialog doesn't have, or a value that it can't have.
    """
    named = {name: options[name] for name in (options.keys() - DIALOG_OPTIONS) & variables - {"messages"}}
    gathered = {name: value for name, value in options.items() if name not in named}
    check_options(gathered)
    if named:
        gathered["chat_template_kwargs"] = {**(gathered.get("chat_template_kwargs") or {}), **named}
    return cast(DialogOptions, gathered)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise LlamaError for an option that a dialog doesn't have, or a value that it can't have."""
    for name, value in options.items():
        if name not in DIALOG_OPTIONS:
            raise LlamaError(f"{name!r} is no option of a dialog; known are {', '.join(sorted(DIALOG_OPTIONS))}")
        if name in ("tools", "documents"):
            if value is not None and not isinstance(value, list | tuple):
                raise LlamaError(f"{name} is {describe(value)}; expected a list of dicts")
            for one in value or ():
                if not isinstance(one, Mapping):
                    hint = ": give a function's JSON schema" if callable(one) else ""
                    raise LlamaError(f"{name} has {describe(one)}; expected dicts{hint}")
        elif name == "chat_template_kwargs":
            if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
                raise LlamaError(f"{name} is {describe(value)}; expected a dict of the template's variables")
            if taken := (DIALOG_OPTIONS | {"messages"}) & (value or {}).keys():
                raise LlamaError(f"{name} has {min(taken)!r}, which is an argument of its own: give it by its name")
        elif not isinstance(value, bool | None):
            raise LlamaError(f"{name} is {describe(value)}; expected True or False")
    if options.get("continue_final_message") and options.get("add_generation_prompt"):
        raise LlamaError(
            "continue_final_message goes on with a message, and add_generation_prompt begins one: give one"
        )


def read_messages(dialog: Any) -> list[dict[str, Any]]:
    """The messages of `dialog` as templates get them: without keys that are None, and their content checked.

    Raises:
        LlamaError: it isn't a list of messages, or is empty; a message has no role, or no content that is text and
            nothing beside it. It says which.
    """
    check_dialog(dialog)
    messages = []
    for number, message in enumerate(dialog, start=1):
        try:
            messages.append(_read_message(message))
        except LlamaError as error:
            raise LlamaError(f"message {number} of {len(dialog)}: {error}") from None
    return messages


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise LlamaError(f"a message is {describe(message)}; expected a dict with 'role' and 'content'")
    if "role" not in message:
        raise LlamaError(f"no 'role', only {sorted(map(str, message))}; expected 'role' and 'content'")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or not role:
        raise LlamaError(f"'role' is {describe(role)}; expected str")
    kept = {key: value for key, value in message.items() if value is not None}
    if content is None:
        # A message that calls tools, or only thinks, needs no content.
        if kept.keys() <= {"role"}:
            if "content" not in message:
                raise LlamaError(f"no 'content', only {sorted(map(str, message))}; expected 'role' and 'content'")
            raise LlamaError("'content' is NoneType None; expected str, unless there are tool_calls or the like")
    elif isinstance(content, list | tuple):
        kept["content"] = [_read_part(number, part) for number, part in enumerate(content, start=1)]
    elif not isinstance(content, str):
        raise LlamaError(f"'content' is {describe(content)}; expected str, or a list of parts that are text")
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def _read_part(number: int, part: Any) -> dict[str, Any]:
    """A part of a content, which is to be text."""
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", **part}
    kind = f"of the type {shorten(part['type'])}" if isinstance(part, Mapping) and "type" in part else describe(part)
    raise LlamaError(f"part {number} of the list 'content' is {kind}; expected {{'type': 'text', 'text': ...}}")


def parts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts that the content of a message consists of."""
    content = message.get("content", "")
    return [part["text"] for part in content] if isinstance(content, list) else [content]


def join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as one text."""
    return {**message, "content": "".join(parts_of(message))} if "content" in message else message
