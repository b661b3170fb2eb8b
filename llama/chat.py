"""A talk with the model in a terminal: reads lines, keeps the dialog, writes the answer as it is made.

Knows how a person types and interrupts; knows nothing of how text is generated.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import TracebackType

from .checks import check_room
from .errors import LlamaError
from .generation import Llama
from .parallel import broadcast_object, is_printer, patient_group
from .tokenizer import Message

if sys.platform != "win32":
    import termios

Sampling = tuple[int | None, float, float]  # max_gen_len, temperature, top_p
UNPRINTABLE = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
CTRL_C = "\x03"  # as a terminal writes it that doesn't send a signal for it
HELP = "/system TEXT, /reset and /quit are commands; Ctrl-C stops an answer"


class Keyboard:
    """Reads the user's lines and hears Ctrl-C, for all ranks; as a context, it leaves the terminal as it found it.

    While an answer is being written, Ctrl-C asks for it to stop. torchrun ends every rank when the terminal sends it
    SIGINT; so on several ranks the terminal is told not to, and rank 0 looks for the key itself.
    """

    def __init__(self) -> None:
        if is_printer() and None in (sys.stdin, sys.stdout):
            raise LlamaError("chat needs standard input and output, and one of them is closed")
        self._ranks = patient_group()
        self._stop = self._reading = False
        self._watched = is_printer() and self._ranks is not None and sys.stdin.isatty()
        if is_printer():
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]

    def __enter__(self) -> "Keyboard":
        self._handler = signal.signal(signal.SIGINT, self._hear)
        if self._watched:
            self._found = termios.tcgetattr(sys.stdin)
            self._found[3] |= termios.ISIG | termios.ICANON | termios.ECHO  # a killed chat may have left them off
            self._set_terminal(termios.ISIG)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what torchrun sends when another rank has died
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._handler)
        if self._watched:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._set_terminal(0)

    def _set_terminal(self, off: int) -> None:
        """The settings found, less these: ISIG (keys that send signals), ICANON (whole lines only), ECHO."""
        settings = list(self._found)
        settings[3] &= ~off
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    def line(self) -> str | None:
        """The next line of the user, on every rank; None at the end of the input; empty after Ctrl-C."""
        line: str | None = None
        if is_printer():
            try:
                self._reading = True
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                line = None
                if sys.stdin.isatty():
                    print()
            except KeyboardInterrupt:
                line = CTRL_C
            finally:
                self._reading = False
            if line is not None and CTRL_C in line:
                print(f"\n({HELP})")
                line = ""
        return broadcast_object(line, self._ranks)

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


def say(text: str, end: str = "\n") -> None:
    """Print, on the one rank that does; a terminal gets no control characters that a model may have made up."""
    if is_printer() and sys.stdout is not None:
        print(text.translate(UNPRINTABLE) if sys.stdout.isatty() else text, end=end, flush=True)


def answer(keyboard: Keyboard, llama: Llama, dialog: list[Message], sampling: Sampling) -> str:
    """Generate and show the assistant's next message, up to its end or Ctrl-C."""
    prompt = llama.formatter.encode_dialog_prompt(dialog)
    check_room(prompt, llama.model.params.max_seq_len)
    text = ""
    with keyboard.listening():
        for (step,) in llama.stream([prompt], *sampling):
            say(step.text, end="")
            text += step.text
            if keyboard.stop_asked():
                say(" [stopped]", end="")
                break
        say("")
    return text


def talk(llama: Llama, system: str | None, sampling: Sampling) -> None:
    """Read a message or a command, answer it, and so on until /quit or the end of the input."""
    history: list[Message] = []
    with Keyboard() as keyboard:
        if sys.stdin.isatty():
            say(HELP)
        while (line := keyboard.line()) is not None:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/reset":
                history = []
                say("(the dialog is forgotten)")
            elif command == "/system":
                system = rest.strip() or None
                say(f"(system message: {system})" if system else "(no system message)")
            elif command.startswith("/"):
                say(f"(unknown command {command}: {HELP})")
            elif line:
                first: list[Message] = [{"role": "system", "content": system}] if system else []
                asked: list[Message] = [*history, {"role": "user", "content": line}]
                try:
                    text = answer(keyboard, llama, first + asked, sampling)
                except LlamaError as e:  # a dialog that has outgrown max_seq_len
                    say(f"(error: {e}; /reset starts anew)")
                else:
                    history = [*asked, {"role": "assistant", "content": text}]
