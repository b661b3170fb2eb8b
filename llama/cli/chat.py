"""A talk with the model: reads messages and commands, keeps the dialog, writes the answer as it is made.

Knows what was said and what may be asked for; knows nothing of how keys are read and how text is generated.
"""

import contextlib
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .._util.console import aside, at_terminal, say
from ..engine.request_checks import check_room
from ..engine.session import Session
from ..errors import LlamaError, make_printable, pluralize
from ..generation import Llama
from ..tokenizer import Message
from .conversation import Dialog, read_dialog, write_dialog
from .keyboard import Keyboard

GREETING = '(/help lists commands, """ begins a text of more lines, Ctrl-C stops an answer)'
OTHER_KEYS = {
    "...\\": "a backslash at its end lets a line go on",
    '"""': "begins a text of several lines, and ends it",
    "Ctrl-C": "drops the line that is typed, or stops the answer",
}
SHARE_FOR_AN_ANSWER = 4  # of the window, one in so many tokens is kept free for it


class Command(NamedTuple):
    """takes: what stands after its name. do: is given that."""

    takes: str
    says: str
    do: Callable[[str], None]


@dataclass
class Stats:
    """How long an answer took, on this rank's clock."""

    asked: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def count(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def __str__(self) -> str:
        rate = f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s, " if self.tokens > 1 else ""
        return f"{rate}first token after {self.first - self.asked:.3f} s"


class Chat:
    """One dialog, on every rank alike: what is decided on rank 0 alone comes through the keyboard."""

    def __init__(self, llama: Llama, keyboard: Keyboard, system: str | None, sampling: Mapping[str, Any]):
        self._llama, self._keyboard, self._sampling = llama, keyboard, sampling
        self._session = Session(llama)
        self._dialog = Dialog(system)
        self._shows_stats = False
        self._commands = {
            "/help": Command("", "list the commands", self._help),
            "/system": Command("[TEXT]", "set the system message; without TEXT, remove it", self._set_system),
            "/retry": Command("", "another answer to the last message", self._retry),
            "/undo": Command("", "forget the last message and its answer", self._undo),
            "/reset": Command("", "forget the dialog, not the system message", self._reset),
            "/save": Command("FILE", "write the dialog to FILE, as JSON", self._save),
            "/load": Command("FILE", "go on with the dialog in FILE, its system message included", self._load),
            "/stats": Command("", "tell each answer's speed and reuse of the cache, or cease to", self._toggle_stats),
            "/quit": Command("", "leave, as Ctrl-D does", lambda _: None),
        }

    def run(self) -> None:
        """Read a message or a command, do what it says, and so on until /quit or the end of the input."""
        while (entry := self._keyboard.entry()) is not None:
            try:
                if entry.literal or not entry.text.startswith("/"):
                    if entry.text:
                        self._ask([*self._dialog.messages, {"role": "user", "content": entry.text}])
                    continue
                name, *rest = entry.text.split(maxsplit=1)
                command = self._checked(name, rest)
                if name == "/quit":
                    return
                command.do("".join(rest))
            except LlamaError as e:
                aside(f"(error: {make_printable(str(e))})", dim=False)

    def _checked(self, name: str, rest: list[str]) -> Command:
        command = self._commands.get(name)
        if command is None:
            raise LlamaError(f"unknown command {name}; /help lists all")
        if rest and not command.takes:
            raise LlamaError(f"{name} takes nothing after it")
        if command.takes == "FILE" and not rest:
            raise LlamaError(f"{name} FILE: the name of the file is missing")
        return command

    # --- answers ----------------------------------------------------------------------------------------------------

    def _ask(self, asked: list[Message]) -> None:
        """Answer the last of these messages, and make them the dialog; a LlamaError leaves it as it was."""
        first, prompt = self._fitted(asked)
        window = self._llama.model.params.max_seq_len
        if first > self._dialog.first:
            turns = sum(one["role"] == "user" for one in asked[self._dialog.first : first])
            oldest = "the oldest turn is" if turns == 1 else f"the {turns} oldest turns are"
            aside(f"(the window of {window} tokens is full: {oldest} no longer read)")
            self._dialog.first = first
        text = self._answer(prompt)
        self._dialog.messages = [*asked, {"role": "assistant", "content": text}]

    def _fitted(self, asked: list[Message]) -> tuple[int, list[int]]:
        """(the first message that is still read, the prompt from there on), with room for an answer.

        Where the last message alone leaves less room, it gets what there is; none is refused with a LlamaError.
        """
        window = self._llama.model.params.max_seq_len
        room = min(self._sampling.get("max_gen_len") or window, window // SHARE_FOR_AN_ANSWER)

        def prompt_from(first: int) -> list[int]:
            return self._llama.formatter.encode_dialog_prompt(self._dialog.shown(asked, first))

        starts = self._dialog.starts(asked)
        prompt = prompt_from(starts[0])
        if len(prompt) + room <= window:
            return starts[0], prompt
        place = bisect_left(starts, True, key=lambda first: len(prompt_from(first)) + room <= window)
        first = starts[min(place, len(starts) - 1)]
        prompt = prompt_from(first)
        check_room(prompt, window)
        return first, prompt

    def _answer(self, prompt: list[int]) -> str:
        """Generate and show the assistant's next message, up to its end or Ctrl-C."""
        stats, text, full = Stats(), "", False
        window = self._llama.model.params.max_seq_len
        try:
            stream = self._session.stream(prompt, **self._sampling)
            with self._keyboard.listening(), contextlib.closing(stream) as steps:
                for step in steps:
                    stats.count()
                    say(step.text, end="")
                    text += step.text
                    full = step.finish_reason == "length" and len(prompt) + step.length == window
                    if self._keyboard.stop_asked():
                        if at_terminal():
                            aside(" [stopped]", end="")
                        break
        finally:
            say("")
        if full:
            aside(f"(the window of {window} tokens is full: the answer ends here)")
        if self._shows_stats:
            right = self._llama.acceptance
            proposed = "" if right is None else f", {right:.0%} of proposed tokens right"
            aside(f"({stats}, {self._session.prefilled} prefilled, {self._session.reused} reused{proposed})")
        return text

    # --- commands ---------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        rows = {f"{name} {command.takes}": command.says for name, command in self._commands.items()} | OTHER_KEYS
        aside("\n".join(f"  {left:<16}{says}" for left, says in rows.items()), dim=False)

    def _set_system(self, text: str) -> None:
        self._dialog.system = text or None
        aside(f"(system message: {text})" if text else "(no system message)")

    def _reset(self, _: str) -> None:
        self._dialog = Dialog(self._dialog.system)
        aside("(the dialog is forgotten)")

    def _undo(self, _: str) -> None:
        self._dialog.undo()
        aside(f"(forgotten; the dialog has {pluralize(len(self._dialog.messages), 'message')})")

    def _retry(self, _: str) -> None:
        """The draw is another one, since a Llama counts how often it was asked what."""
        asked = self._dialog.messages[: self._dialog.last_asked() + 1]
        if self._sampling.get("temperature") == 0:
            aside("(at temperature 0 an answer is always the same)")
        self._ask(asked)

    def _save(self, name: str) -> None:
        messages = self._dialog.whole()
        if not messages:
            raise LlamaError("there is nothing to save yet")
        self._keyboard.on_first_rank(lambda: write_dialog(name, messages))
        aside(f"(saved {pluralize(len(messages), 'message')} to {make_printable(name)})")

    def _load(self, name: str) -> None:
        def read() -> list[Message]:
            messages = read_dialog(name)
            self._llama.formatter.encode_dialog_prompt(messages)  # a template may refuse it
            return messages

        messages = self._keyboard.on_first_rank(read)
        self._dialog = Dialog.of(messages)
        aside(f"(loaded {pluralize(len(messages), 'message')} from {make_printable(name)})")

    def _toggle_stats(self, _: str) -> None:
        self._shows_stats = not self._shows_stats
        told = "(from now on each answer's speed is told, and what of its prompt was reused)"
        aside(told if self._shows_stats else "(an answer's speed is no longer told)")


def talk(llama: Llama, system: str | None, sampling: Mapping[str, Any]) -> None:
    """Talk until /quit or the end of the input; see `llama.settings` for sampling."""
    with Keyboard() as keyboard:
        if at_terminal():
            aside(GREETING)
        Chat(llama, keyboard, system, sampling).run()
