"""The conversation of a chat: its messages, which of them the model still sees, and the file they are saved in.

Knows messages; knows no terminal, no tokens and no model.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .._util.files import describe_failure, read_bytes, unreadable_error, write_whole
from ..errors import LlamaError, shorten
from ..tokenization.messages import DialogOptions, check_options, read_messages
from ..tokenizer import ROLES, Message

EXPECTED = 'a JSON list of {"role": ..., "content": ...}'


class Conversation:
    """A system message, which the model always sees, and the messages after it, of which it may see only the last."""

    system: str | None
    messages: list[Message]  # without the system message
    first_visible: int  # index in `messages` of the first that the model still sees

    def __init__(self, system: str | None = None, messages: Sequence[Message] = ()):
        self.system = system
        self.messages = list(messages)
        self.first_visible = 0

    @staticmethod
    def from_messages(messages: Sequence[Message]) -> "Conversation":
        """Of a whole dialog, whose first message may be the system message."""
        if messages and messages[0]["role"] == "system":
            return Conversation(messages[0]["content"], messages[1:])
        return Conversation(None, messages)

    def all_messages(self) -> list[Message]:
        return self.prepend_system(self.messages)

    def prepend_system(self, messages: Sequence[Message]) -> list[Message]:
        """These messages after the system message, if there is one."""
        return [{"role": "system", "content": self.system}, *messages] if self.system else [*messages]

    def possible_starts(self, messages: Sequence[Message]) -> list[int]:
        """Where the part of `messages` that the model sees may begin: as now, or at any later user message."""
        later = range(self.first_visible + 1, len(messages))
        return [self.first_visible, *(i for i in later if messages[i]["role"] == "user")]

    def last_user_message(self) -> int:
        """The index of the user's last message. Raises LlamaError if there is none."""
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise LlamaError("nothing was asked yet")

    def undo(self) -> None:
        """Forget the user's last message and all that follows it."""
        del self.messages[self.last_user_message() :]
        self.first_visible = min(self.first_visible, len(self.messages))


def read_dialog(name: str) -> list[Message]:
    """The messages in a file that `write_dialog` wrote. Raises LlamaError for a file that holds anything else."""
    path = Path(os.path.expanduser(name))
    dialog = _read_json(path, EXPECTED)
    if not isinstance(dialog, list) or not dialog:
        raise LlamaError(f"{path} holds {shorten(dialog)}: expected {EXPECTED}")
    for number, message in enumerate(dialog, start=1):
        which = f"{path}: message {number} of {len(dialog)}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list | None):
            raise LlamaError(f"{which} is {shorten(message)}: expected {EXPECTED}, both of them texts")
        if not isinstance(message.get("role"), str):
            raise LlamaError(f"{which} has the role {shorten(message.get('role'))}: expected {', '.join(ROLES)} ...")
        if message["role"] == "system" and number > 1:
            raise LlamaError(f"{which} is a system message: expected it before all others, or not at all")
    try:
        read_messages(dialog)
    except LlamaError as e:
        raise LlamaError(f"{path}: {e}") from None
    return dialog


def _read_json(path: Path, expected: str) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise LlamaError(f"{path} is no file: expected {expected}")
        return json.loads(read_bytes(path))
    except OSError as e:
        raise unreadable_error(path, e) from None
    except LlamaError:
        raise
    except (ValueError, RecursionError) as e:
        raise LlamaError(f"{path} is not JSON ({e}): expected {expected}") from None


def read_dialog_options(tools: str | None, documents: str | None, kwargs: str | None) -> DialogOptions:
    """What is asked for the dialog: from two files of JSON lists, and a JSON object. None: nothing of the kind."""
    asked: dict[str, Any] = {}
    for name, file in (("tools", tools), ("documents", documents)):
        if file is not None:
            asked[name] = _read_json(Path(os.path.expanduser(file)), "a JSON list of objects")
    if kwargs is not None:
        try:
            asked["chat_template_kwargs"] = json.loads(kwargs)
        except (ValueError, RecursionError) as e:
            raise LlamaError(f"--chat_template_kwargs is not JSON ({e}): expected an object, as {{...}}") from None
    check_options(asked)
    return cast(DialogOptions, asked)


def write_dialog(name: str, messages: Sequence[Message]) -> None:
    """Write a file that `read_dialog` reads, whole or not at all. It may replace a dialog, but no other file."""
    path = Path(os.path.expanduser(name))
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size == 0):
            read_dialog(name)
    except (LlamaError, OSError):
        raise LlamaError(f"{path} exists and is no dialog: give another name") from None
    text = json.dumps(messages, indent=2, ensure_ascii=False) + "\n"
    try:
        write_whole(path, lambda f: f.write(text.encode()))
    except (OSError, ValueError) as e:
        reason = describe_failure(e) if isinstance(e, OSError) else e
        raise LlamaError(f"{path} can't be written ({reason}): expected a directory that you may write to") from None
