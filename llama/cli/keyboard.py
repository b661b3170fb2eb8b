"""Reads what a person types in a chat: lines and blocks of lines, their history, and Ctrl-C.

Knows terminals; knows no command, no dialog and no model.
"""

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from .._util.console import is_interactive, print_note
from .._util.files import cache_home, read_bytes, write_whole
from .._util.ranks import has_other_ranks
from ..errors import LlamaError

if sys.platform != "win32":
    import termios

CTRL_C = "\x03"  # the character of the key, on a terminal that sends no signal for it
QUOTES = '"""'
HINT = "(Ctrl-C drops a line or stops an answer; /help lists commands, /quit leaves)"
HISTORY_ENTRIES = 1000  # that the history file holds at most
HISTORY_CHARACTERS = 10_000  # of the longest entry that is written to the file


class Entry(NamedTuple):
    """What a person typed: a message or a command."""

    text: str
    literal: bool = False  # typed between quotes: a message, even if it begins with a slash


def parse_entry(typed: str, ended: bool = False) -> Entry | None:
    """The entry in these lines; None if more lines belong to it: after a backslash, or inside quotes.

    ended: whether the input has ended, so that no more lines will come.
    """
    typed = typed.strip()
    if typed.startswith(QUOTES):
        body = typed.removeprefix(QUOTES)
        if body.endswith(QUOTES) or ended:
            return Entry(body.removesuffix(QUOTES).strip(), literal=True)
        return None
    if typed.endswith("\\") and not ended:
        return None
    return Entry("\n".join(line.removesuffix("\\") for line in typed.split("\n")).strip())


def _turn_off_signal_keys() -> None:
    settings = termios.tcgetattr(sys.stdin)
    settings[3] &= ~termios.ISIG
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


class LineEditor:
    """readline: keys that edit the line, and the history of all chats, in a file that only its owner may read."""

    def __init__(self, ctrl_c_is_a_key: bool):
        """ctrl_c_is_a_key: whether the terminal sends no signal for Ctrl-C. Raises ImportError without readline."""
        import readline  # missing on some systems; and importing it changes what `input` does

        self._readline = readline
        readline.set_auto_history(False)
        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one entry
        if ctrl_c_is_a_key:
            readline.parse_and_bind(r'"\C-c": "\C-a\C-k\C-v\C-c\C-m"')  # an empty line, the key itself, Enter
            readline.set_startup_hook(_turn_off_signal_keys)  # readline turns them on before each line
        readline.clear_history()
        for entry in self._read_history():
            self._add(entry)

    def remember(self, typed: str) -> None:
        """Add an entry to the history, and to its file at once, since the terminal may be closed at any moment.

        The file is read again before, since another chat may have added to it.
        """
        self._add(typed)
        if len(typed) > HISTORY_CHARACTERS:
            return
        history = self._read_history()
        kept = [*history, *([] if history[-1:] == [typed] else [typed])][-HISTORY_ENTRIES:]
        with contextlib.suppress(OSError, RuntimeError, LlamaError):  # without a home, on a full disk: the chat goes on
            path = cache_home() / "chat_history.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda f: f.write(json.dumps(kept, indent=0).encode()), mode=0o600)

    def _add(self, typed: str) -> None:
        with contextlib.suppress(ValueError):  # characters that a terminal can't type
            self._readline.add_history(typed)

    def _read_history(self) -> list[str]:
        try:
            history = json.loads(read_bytes(cache_home() / "chat_history.json"))
        except (OSError, RuntimeError, ValueError):
            return []
        return [entry for entry in history if isinstance(entry, str)] if isinstance(history, list) else []


class Keyboard:
    """Reads entries, on rank 0. A context manager that restores the terminal's settings.

    While an answer is generated, Ctrl-C asks it to stop. On several ranks, torchrun ends them all once the terminal
    sends SIGINT; so the terminal is set to send no signal, and the key is polled for. If standard input is no
    terminal, Ctrl-C ends the program, as usual.
    """

    def __init__(self) -> None:
        if None in (sys.stdin, sys.stdout):
            raise LlamaError("chat needs standard input and output, and one of them is closed")
        self._stop_requested = self._is_reading = False
        self._stdin_is_terminal = sys.stdin.isatty()
        self._polls_ctrl_c = self._stdin_is_terminal and has_other_ranks()
        self._editor: LineEditor | None = None
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if is_interactive():
            with contextlib.suppress(ImportError):
                self._editor = LineEditor(self._polls_ctrl_c)

    def __enter__(self) -> "Keyboard":
        if self._stdin_is_terminal:
            self._handlers = {
                signal.SIGINT: signal.signal(signal.SIGINT, self._handle_ctrl_c),
                # torchrun sends it when another rank has died. Exiting restores the terminal.
                signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)),
            }
        if self._polls_ctrl_c:
            self._saved_settings = termios.tcgetattr(sys.stdin)
            # A chat that was killed may have left these off.
            self._saved_settings[3] |= termios.ISIG | termios.ICANON | termios.ECHO
            self._set_terminal(termios.ISIG)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._stdin_is_terminal:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if self._polls_ctrl_c:
            self._set_terminal(0)

    def _set_terminal(self, off: int) -> None:
        """Set the saved settings, but without the flags `off`: ISIG (keys send signals), ICANON (whole lines), ECHO."""
        settings = list(self._saved_settings)
        settings[3] &= ~off
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    def read_entry(self) -> Entry | None:
        """What the user types next. None at the end of the input; an empty entry after Ctrl-C."""
        typed: list[str] = []
        prompts = ("> ", "... ") if is_interactive() else ("", "")
        try:
            self._is_reading = True
            while True:
                typed.append(input(prompts[bool(typed)]))
                if CTRL_C in typed[-1]:
                    raise KeyboardInterrupt
                if (entry := parse_entry("\n".join(typed))) is not None:
                    break
        except EOFError:
            if is_interactive():
                print()
            if not typed:
                return None
            entry = parse_entry("\n".join(typed), ended=True)
        except KeyboardInterrupt:
            if not self._stdin_is_terminal:
                raise
            print_note("\n" + HINT)
            return Entry("")
        finally:
            self._is_reading = False
        if self._editor is not None and entry is not None and entry.text:
            self._editor.remember("\n".join(typed))
        return entry

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """A context for generating an answer: in it, `is_stop_requested` notices Ctrl-C."""
        self._stop_requested = False
        if self._polls_ctrl_c:
            self._set_terminal(termios.ISIG | termios.ICANON | termios.ECHO)
        try:
            yield
        finally:
            if self._polls_ctrl_c:
                self._set_terminal(termios.ISIG)

    def _handle_ctrl_c(self, *_: object) -> None:
        """A signal handler: drops the line that is typed, or stops the answer that is generated."""
        if self._is_reading:
            raise KeyboardInterrupt
        self._stop_requested = True

    def is_stop_requested(self) -> bool:
        """Whether the answer shall stop."""
        if self._polls_ctrl_c and select.select([sys.stdin], [], [], 0)[0]:
            self._stop_requested |= CTRL_C.encode() in os.read(sys.stdin.fileno(), 1024)
        return self._stop_requested
