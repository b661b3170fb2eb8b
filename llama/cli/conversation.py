"""The dialog of a talk: what was said, what of it the model is still shown, and its file.

Knows messages; knows no terminal, no tokens and no model.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .._util.files import unreadable, write_whole
from ..errors import LlamaError, shorten
from ..tokenizer import ROLES, Message

EXPECTED = 'a JSON list of {"role": ..., "content": ...}'


class Dialog:
    """messages: all but the system message. first: the place of the first that the model is still shown."""

    def __init__(self, system: str | None = None, messages: Sequence[Message] = ()):
        self.system = system
        self.messages = list(messages)
        self.first = 0

    @staticmethod
    def of(messages: Sequence[Message]) -> "Dialog":
        """Of a whole list, whose first may be the system message."""
        if messages and messages[0]["role"] == "system":
            return Dialog(messages[0]["content"], messages[1:])
        return Dialog(None, messages)

    def whole(self) -> list[Message]:
        return [*self._head(), *self.messages]

    def shown(self, asked: Sequence[Message], first: int) -> list[Message]:
        """What the model is shown of `asked`, messages without the system's, from `first` on."""
        return [*self._head(), *asked[first:]]

    def _head(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def starts(self, asked: Sequence[Message]) -> list[int]:
        """Where the model may begin to read `asked`: at what it begins with now, and at each later turn."""
        return [self.first, *(i for i in range(self.first + 1, len(asked)) if asked[i]["role"] == "user")]

    def last_asked(self) -> int:
        """The place of the user's last message. Raises LlamaError where there is none."""
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise LlamaError("nothing was asked yet")

    def undo(self) -> None:
        """Forget the user's last message and what follows it."""
        del self.messages[self.last_asked() :]
        self.first = min(self.first, len(self.messages))


def read_dialog(name: str) -> list[Message]:
    """The messages in a file. Raises LlamaError for one that holds anything else."""
    path = Path(os.path.expanduser(name))
    try:
        if path.exists() and not path.is_file():
            raise LlamaError(f"{path} is no file: expected {EXPECTED}")
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from None
    except LlamaError:
        raise
    except (ValueError, RecursionError) as e:
        raise LlamaError(f"{path} is not JSON ({e}): expected {EXPECTED}") from None
    if not isinstance(found, list) or not found:
        raise LlamaError(f"{path} holds {shorten(found)}: expected {EXPECTED}")
    for number, message in enumerate(found, start=1):
        which = f"{path}: message {number} of {len(found)}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise LlamaError(f"{which} is {shorten(message)}: expected {EXPECTED}, both of them texts")
        if message.get("role") not in ROLES:
            raise LlamaError(f"{which} has the role {shorten(message.get('role'))}: expected {', '.join(ROLES)}")
        if message["role"] == "system" and number > 1:
            raise LlamaError(f"{which} is a system message: expected it before all others, or not at all")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def write_dialog(name: str, messages: Sequence[Message]) -> None:
    """Write a file that `read_dialog` reads, whole or not at all; over another dialog, never over anything else."""
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
        reason = e.strerror if isinstance(e, OSError) else e
        raise LlamaError(f"{path} can't be written ({reason}): expected a directory that you may write to") from None
