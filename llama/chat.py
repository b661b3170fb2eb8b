"""A talk with the model in a terminal: reads lines, keeps the dialog, writes the answer as it is made.

Knows how a person types and interrupts; knows nothing of how text is generated.
"""

import os
import select
import signal
import sys
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .errors import LlamaError
from .generation import Llama
from .parallel import broadcast_object, is_printer
from .tokenizer import Message

HELP = "/system TEXT sets the system message, /reset forgets the dialog, /quit leaves; Ctrl-C stops an answer"


class CtrlC:
    """While an answer is being written, Ctrl-C asks for it to stop and doesn't end the program.

    torchrun ends every rank when the terminal sends it SIGINT. So on several ranks the terminal is told not to, and
    rank 0 looks for the key itself.
    """

    def __init__(self) -> None:
        self._asked = False
        self._terminal: list[Any] | None = None

    def __enter__(self) -> "CtrlC":
        self._handler = signal.signal(signal.SIGINT, self._ask)
        if is_printer() and dist.get_world_size() > 1 and sys.stdin.isatty():
            import termios  # only where there is a terminal of that kind

            self._terminal = termios.tcgetattr(sys.stdin)
            quiet = list(self._terminal)
            quiet[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._handler)
        if self._terminal is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether the answer is to stop: the same on every rank."""
        if self._terminal is not None and select.select([sys.stdin], [], [], 0)[0]:
            self._asked |= b"\x03" in os.read(sys.stdin.fileno(), 1024)
        return broadcast_object(self._asked)


def say(text: str, end: str = "\n") -> None:
    if is_printer():
        print(text, end=end, flush=True)


def read_line() -> str | None:
    """The next line of the user, on every rank; None at the end of the input."""
    line: str | None = None
    if is_printer():
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            line = None
        except KeyboardInterrupt:
            line = ""
            print(f"\n({HELP})")
    return broadcast_object(line)


def answer(llama: Llama, dialog: list[Message], temperature: float, top_p: float, max_gen_len: int | None) -> str:
    """Generate and show the assistant's next message, up to its end or Ctrl-C."""
    prompt = llama.formatter.encode_dialog_prompt(dialog)
    text = ""
    with CtrlC() as ctrl_c:
        for (step,) in llama.stream([prompt], max_gen_len, temperature, top_p):
            say(step.text, end="")
            text += step.text
            if ctrl_c.asked():
                say(" [stopped]", end="")
                break
    say("")
    return text


def talk(llama: Llama, system: str | None, temperature: float, top_p: float, max_gen_len: int | None) -> None:
    """Read a message or a command, answer it, and so on until /quit or the end of the input."""
    if sys.stdin.isatty():
        say(HELP)
    history: list[Message] = []
    while (line := read_line()) is not None:
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
                text = answer(llama, first + asked, temperature, top_p, max_gen_len)
            except LlamaError as e:  # most likely a dialog that has outgrown max_seq_len
                say(f"(error: {e}; /reset starts anew)")
            else:
                history = [*asked, {"role": "assistant", "content": text}]
