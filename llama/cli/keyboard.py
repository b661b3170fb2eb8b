"""Reads what a person types in a talk, for all ranks: lines and blocks of lines, their history, and Ctrl-C.

Knows terminals; knows no command, no dialog and no model.
"""

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, TypeVar

from .._util.console import aside, at_terminal
from .._util.files import cache_home, write_whole
from .._util.ranks import is_main_process
from ..errors import LlamaError
from ..parallel import broadcast_object, new_long_timeout_group

if sys.platform != "win32":
    import termios

T = TypeVar("T")

CTRL_C = "\x03"  # as a terminal writes it that doesn't send a signal for it
QUOTES = '"""'
HINT = "(Ctrl-C drops a line or stops an answer; /help lists commands, /quit leaves)"
KEPT, LONGEST = 1000, 10_000  # entries of the history, and characters of one that is kept in its file


class Entry(NamedTuple):
    """What a person typed up to its end. literal: between quotes, so that it is a message whatever it begins with."""

    text: str
    literal: bool = False


def entry_of(typed: str, ended: bool = False) -> Entry | None:
    """What these lines say; None where they go on: after a backslash, or inside quotes. ended: no more will come."""
    typed = typed.strip()
    if typed.startswith(QUOTES):
        body = typed.removeprefix(QUOTES)
        if body.endswith(QUOTES) or ended:
            return Entry(body.removesuffix(QUOTES).strip(), literal=True)
        return None
    if typed.endswith("\\") and not ended:
        return None
    return Entry("\n".join(line.removesuffix("\\") for line in typed.split("\n")).strip())


def _without_signals() -> None:
    settings = termios.tcgetattr(sys.stdin)
    settings[3] &= ~termios.ISIG
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


class LineEditor:
    """readline: keys that edit, and the history of all talks, in a file that only its owner may read.

    hears_ctrl_c: the terminal sends no signal for it, so that it is a key like others.
    """

    def __init__(self, hears_ctrl_c: bool):
        import readline  # not on every system; and it changes what `input` does

        self._readline = readline
        readline.set_auto_history(False)
        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted come as one
        if hears_ctrl_c:
            readline.parse_and_bind(r'"\C-c": "\C-a\C-k\C-v\C-c\C-m"')  # an empty line, the key itself, Enter
            readline.set_startup_hook(_without_signals)  # since readline, before each line, turns them on
        readline.clear_history()
        for entry in self._stored():
            self._add(entry)

    def remember(self, typed: str) -> None:
        """At once, since a terminal may be closed; over what is there now, since other talks may go on beside."""
        self._add(typed)
        if len(typed) > LONGEST:
            return
        stored = self._stored()
        kept = [*stored, *([] if stored[-1:] == [typed] else [typed])][-KEPT:]
        with contextlib.suppress(OSError, RuntimeError):  # no home, no disk: the talk goes on
            path = cache_home() / "chat_history.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda f: f.write(json.dumps(kept, indent=0).encode()), mode=0o600)

    def _add(self, typed: str) -> None:
        with contextlib.suppress(ValueError):  # characters that a terminal can't type
            self._readline.add_history(typed)

    def _stored(self) -> list[str]:
        try:
            found = json.loads((cache_home() / "chat_history.json").read_bytes())
        except (OSError, RuntimeError, ValueError):
            return []
        return [entry for entry in found if isinstance(entry, str)] if isinstance(found, list) else []


class Keyboard:
    """As a context, it leaves the terminal as it found it.

    While an answer is being written, Ctrl-C asks for it to stop. torchrun ends every rank when the terminal sends it
    SIGINT; so on several ranks the terminal is told not to, and rank 0 looks for the key itself. Where nobody types,
    Ctrl-C ends the program, as elsewhere.
    """

    def __init__(self) -> None:
        if is_main_process() and None in (sys.stdin, sys.stdout):
            raise LlamaError("chat needs standard input and output, and one of them is closed")
        self._ranks = new_long_timeout_group()
        self._stop = self._reading = False
        self._typed = is_main_process() and sys.stdin.isatty()
        self._watched = self._typed and self._ranks is not None
        self._editor: LineEditor | None = None
        if is_main_process():
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
            if at_terminal():
                with contextlib.suppress(ImportError):
                    self._editor = LineEditor(self._watched)

    def __enter__(self) -> "Keyboard":
        if self._typed:
            self._handlers = {
                signal.SIGINT: signal.signal(signal.SIGINT, self._hear),
                # What torchrun sends when another rank has died; the terminal is left in order.
                signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)),
            }
        if self._watched:
            self._found = termios.tcgetattr(sys.stdin)
            self._found[3] |= termios.ISIG | termios.ICANON | termios.ECHO  # a killed chat may have left them off
            self._set_terminal(termios.ISIG)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._typed:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if self._watched:
            self._set_terminal(0)

    def _set_terminal(self, off: int) -> None:
        """The settings found, less these: ISIG (keys that send signals), ICANON (whole lines only), ECHO."""
        settings = list(self._found)
        settings[3] &= ~off
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    def entry(self) -> Entry | None:
        """What the user types next, on every rank; None at the end of the input; empty after Ctrl-C."""
        return broadcast_object(self._read() if is_main_process() else None, self._ranks)

    def _read(self) -> Entry | None:
        typed: list[str] = []
        prompts = ("> ", "... ") if at_terminal() else ("", "")
        try:
            self._reading = True
            while True:
                typed.append(input(prompts[bool(typed)]))
                if CTRL_C in typed[-1]:
                    raise KeyboardInterrupt
                if (entry := entry_of("\n".join(typed))) is not None:
                    break
        except EOFError:
            if at_terminal():
                print()
            if not typed:
                return None
            entry = entry_of("\n".join(typed), ended=True)
        except KeyboardInterrupt:
            if not self._typed:
                raise
            aside("\n" + HINT)
            return Entry("")
        finally:
            self._reading = False
        if self._editor is not None and entry is not None and entry.text:
            self._editor.remember("\n".join(typed))
        return entry

    def on_first_rank(self, do: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank; so is the LlamaError that it raises."""
        found: T | None = None
        error: str | None = None
        if is_main_process():
            try:
                found = do()
            except LlamaError as e:
                error = str(e)
        found, error = broadcast_object((found, error), self._ranks)
        if error is not None:
            raise LlamaError(error)
        return found  # type: ignore[return-value]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While in this context, `stop_asked` hears Ctrl-C."""
        self._stop = False
        if self._watched:
            self._set_terminal(termios.ISIG | termios.ICANON | termios.ECHO)
        try:
            yield
        finally:
            if self._watched:
                self._set_terminal(termios.ISIG)

    def _hear(self, *_: object) -> None:
        """Ctrl-C as a signal: drops the line that is being typed, or stops the answer that is being written."""
        if self._reading:
            raise KeyboardInterrupt
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether the answer is to stop: the same on every rank."""
        if self._watched and select.select([sys.stdin], [], [], 0)[0]:
            self._stop |= CTRL_C.encode() in os.read(sys.stdin.fileno(), 1024)
        return broadcast_object(self._stop)
