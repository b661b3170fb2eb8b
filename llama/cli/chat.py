"""`python -m llama chat`: reads messages and commands, keeps the conversation, prints answers as they are generated.

Knows the conversation and the commands; knows nothing of how keys are read and how text is generated.
"""

import argparse
import contextlib
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .._util.console import is_interactive, print_note, say
from .._util.ranks import is_main_process
from .._util.validate import suggest
from ..engine.request_checks import check_room
from ..errors import LlamaError, make_printable, pluralize
from ..generation import Llama
from ..session import Session
from ..tokenization.messages import DialogOptions
from ..tokenization.texts import read_content
from ..tokenizer import Message
from .conversation import Conversation, read_dialog, read_dialog_options, write_dialog
from .keyboard import Keyboard
from .mistakes import format_error
from .model_options import add_model_options, build_model, read_settings, read_speculation, recommend_settings

GREETING = '(/help lists commands, """ begins a multi-line text, Ctrl-C stops an answer)'
OTHER_KEYS = {
    "...\\": "a backslash at its end lets a line go on",
    '"""': "begins and ends a text of several lines",
    "Ctrl-C": "drops the line that is typed, or stops the answer",
}
LEAVING = ("/quit", "/exit", "quit", "exit")  # entries, as a whole, in upper or lower case
WINDOW_SHARE = 4  # one in so many tokens of the context window is kept free for an answer


class Command(NamedTuple):
    argument: str  # how /help shows it: "", "[TEXT]" or "FILE"
    purpose: str
    run: Callable[[str], None]  # called with the argument


@dataclass
class Stats:
    """How fast an answer was generated. Times are in seconds, on this rank's clock."""

    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    last_token: float = 0.0
    tokens: int = 0

    def count(self) -> None:
        """Count a token that has just arrived."""
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        self.tokens += 1

    def __str__(self) -> str:
        seconds = self.last_token - self.first_token
        rate = f"{(self.tokens - 1) / seconds:.1f} tokens/s, " if self.tokens > 1 else ""
        return f"{rate}first token after {self.first_token - self.started:.3f} s"


class Chat:
    """A chat."""

    answered: bool | None  # whether there was an answer; None: nothing was asked

    def __init__(
        self, llama: Llama, keyboard: Keyboard, system: str | None, options: Mapping[str, Any], asked: DialogOptions
    ):
        """options: settings of answers. asked: of the dialog: its tools and so on."""
        self._llama, self._keyboard, self._options, self._asked = llama, keyboard, options, asked
        self.answered = None
        self._session = Session(llama)
        self._conversation = Conversation(system)
        self._shows_stats = False
        self._commands = {
            "/help": Command("", "list the commands", self._help),
            "/system": Command("[TEXT]", "set the system message; without TEXT, remove it", self._set_system),
            "/retry": Command("", "another answer to the last message", self._retry),
            "/undo": Command("", "forget the last message and its answer", self._undo),
            "/reset": Command("", "forget the dialog, not the system message", self._reset),
            "/save": Command("FILE", "write the dialog to FILE, as JSON", self._save),
            "/load": Command("FILE", "go on with the dialog in FILE, its system message included", self._load),
            "/stats": Command("", "show, or hide, each answer's speed and reuse of the cache", self._toggle_stats),
            "/quit": Command("", "leave, as quit, exit and Ctrl-D do", lambda _: None),
        }

    def run(self) -> None:
        """Read messages and commands, and act on them, until /quit or the end of the input."""
        while (entry := self._keyboard.read_entry()) is not None:
            try:
                if entry.text.lower() in LEAVING and not entry.literal:
                    return
                if entry.literal or not entry.text.startswith("/"):
                    if entry.text:
                        self._reply([*self._conversation.messages, {"role": "user", "content": entry.text}])
                    continue
                name, *arguments = entry.text.split(maxsplit=1)
                command = self._find_command(name, arguments)
                command.run("".join(arguments))
            except LlamaError as e:
                print_note(f"({format_error(e)})", dim=False)

    def _find_command(self, name: str, arguments: list[str]) -> Command:
        """Raises LlamaError for an unknown command, and for an argument too many or too few."""
        command = self._commands.get(name)
        if command is None:
            raise LlamaError(f"unknown command {name}; /help lists all{suggest(name, self._commands)}")
        if arguments and not command.argument:
            raise LlamaError(f"{name} takes nothing after it")
        if command.argument == "FILE" and not arguments:
            raise LlamaError(f"{name} FILE: the name of the file is missing")
        return command

    # --- answers ----------------------------------------------------------------------------------------------------

    def _reply(self, messages: list[Message]) -> None:
        """Answer the last of these messages, and make them the conversation. A LlamaError leaves it as it was."""
        self.answered = bool(self.answered)
        first, prompt_tokens = self._fit(messages)
        window = self._llama.model.params.max_seq_len
        if first > self._conversation.first_visible:
            dropped = messages[self._conversation.first_visible : first]
            turns = sum(message["role"] == "user" for message in dropped)
            oldest = "the oldest turn is" if turns == 1 else f"the {turns} oldest turns are"
            print_note(f"(the window of {window} tokens is full: {oldest} no longer read)")
            self._conversation.first_visible = first
        text = self._generate(prompt_tokens)
        self.answered = True
        self._conversation.messages = [*messages, {"role": "assistant", "content": text}]

    def _fit(self, messages: list[Message]) -> tuple[int, list[int]]:
        """(index of the first message that still fits into the context window, the prompt's tokens from there on).

        As few of the oldest turns are dropped as leave room for an answer. If the last message alone leaves less room,
        the answer gets what there is; if it leaves none, LlamaError is raised.
        """
        window = self._llama.model.params.max_seq_len
        room = min(self._options.get("max_gen_len") or window, window // WINDOW_SHARE)

        def encode_from(first: int) -> list[int]:
            visible = self._conversation.prepend_system(messages[first:])
            return self._llama.formatter.encode_dialog_prompt(visible, **self._asked)

        starts = self._conversation.possible_starts(messages)
        prompt_tokens = encode_from(starts[0])
        if len(prompt_tokens) + room <= window:
            return starts[0], prompt_tokens
        place = bisect_left(starts, True, key=lambda first: len(encode_from(first)) + room <= window)
        first = starts[min(place, len(starts) - 1)]
        prompt_tokens = encode_from(first)
        check_room(prompt_tokens, window)
        return first, prompt_tokens

    def _generate(self, prompt_tokens: list[int]) -> str:
        """Generate and print the assistant's next message, up to its end or Ctrl-C; returns its text."""
        stats, written, text, window_is_full = Stats(), "", "", False
        window = self._llama.model.params.max_seq_len
        try:
            stream = self._session.stream(prompt_tokens, **self._options)
            with self._keyboard.stoppable(), contextlib.closing(stream) as steps:
                for step in steps:
                    stats.count()
                    written += step.text
                    shown, text = len(text), read_content(self._llama.tokenizer, written)
                    say(text[shown:], end="")
                    window_is_full = step.finish_reason == "length" and len(prompt_tokens) + step.length == window
                    if self._keyboard.is_stop_requested():
                        if is_interactive():
                            print_note(" [stopped]", end="")
                        break
        finally:
            say("")
        if window_is_full:
            print_note(f"(the window of {window} tokens is full: the answer ends here)")
        if self._shows_stats:
            acceptance = self._llama.acceptance
            proposed = "" if acceptance is None else f", {acceptance:.0%} of proposed tokens right"
            print_note(f"({stats}, {self._session.prefilled} prefilled, {self._session.reused} reused{proposed})")
        return text

    # --- commands ---------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        rows = {f"{name} {command.argument}": command.purpose for name, command in self._commands.items()} | OTHER_KEYS
        print_note("\n".join(f"  {keys:<16}{purpose}" for keys, purpose in rows.items()), dim=False)

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None
        print_note(f"(system message: {text})" if text else "(no system message)")

    def _reset(self, _: str) -> None:
        self._conversation = Conversation(self._conversation.system)
        print_note("(the dialog is forgotten)")

    def _undo(self, _: str) -> None:
        self._conversation.undo()
        print_note(f"(forgotten; the dialog has {pluralize(len(self._conversation.messages), 'message')})")

    def _retry(self, _: str) -> None:
        """The answer is drawn anew, since a Llama counts how often each prompt was asked."""
        messages = self._conversation.messages[: self._conversation.last_user_message() + 1]
        if self._options.get("temperature") == 0:
            print_note("(at temperature 0 an answer is always the same)")
        self._reply(messages)

    def _save(self, name: str) -> None:
        messages = self._conversation.all_messages()
        if not messages:
            raise LlamaError("there is nothing to save yet")
        write_dialog(name, messages)
        print_note(f"(saved {pluralize(len(messages), 'message')} to {make_printable(name)})")

    def _load(self, name: str) -> None:
        messages = read_dialog(name)
        self._llama.formatter.encode_dialog_prompt(messages, **self._asked)  # a chat template may refuse the dialog
        self._conversation = Conversation.from_messages(messages)
        print_note(f"(loaded {pluralize(len(messages), 'message')} from {make_printable(name)})")

    def _toggle_stats(self, _: str) -> None:
        self._shows_stats = not self._shows_stats
        shown = "(from now on, each answer's speed and its reuse of the cache are shown)"
        print_note(shown if self._shows_stats else "(an answer's speed is no longer shown)")


def talk(llama: Llama, system: str | None, options: Mapping[str, Any], asked: DialogOptions | None = None) -> None:
    """Chat until /quit or the end of the input. system: the system message to start with. asked: see `Chat`.

    On several ranks, the first one talks and the others follow it. Exits with status 1 if no message of a program's was
    answered.
    """
    if not is_main_process():
        return llama.engine.follow()
    with llama.engine.lead(), Keyboard() as keyboard:
        if is_interactive():
            print_note(GREETING)
        chat = Chat(llama, keyboard, system, options, asked or {})
        chat.run()
    if chat.answered is False and not is_interactive():
        sys.exit(1)


def add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = "In the chat, /help lists its commands; quit, exit and Ctrl-D leave it."
    command.add_argument("--system", metavar="TEXT", help="the system message to start with")
    command.add_argument("--tools", metavar="FILE", help="JSON list of the schemas of functions that it may call")
    command.add_argument("--documents", metavar="FILE", help="JSON list of documents, for templates that take some")
    kwargs = "JSON object of variables of the chat template, such as '{\"enable_thinking\": false}'"
    command.add_argument("--chat_template_kwargs", metavar="JSON", help=kwargs)
    add_model_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    settings = {**read_settings(options, recommend_settings(options)), **read_speculation(options)}
    asked = read_dialog_options(options.tools, options.documents, options.chat_template_kwargs)
    talk(build_model(options), options.system, settings, asked)
