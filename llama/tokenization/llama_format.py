"""What Llama 3's chat format has beyond messages that are a role and a text: tools and their calls, rows to train on.

`ChatFormat` knows the plain format; this adds Llama 3.1's, as its published template writes it. Knows no files, no
tensors and no Jinja.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ..errors import LlamaError, describe
from ..tokenizer import END_OF_MESSAGE, END_OF_TURN, ROLES, ChatFormat, Dialog, Tokenizer
from .messages import DialogOptions, UnusedWarnings, gather_options, join_parts, read_messages
from .protocol import DialogRow

_TOOL_ROLES = "tool", "ipython"
# Of the published template.
VARIABLES = frozenset({"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"})
_EXPLANATION = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
)


@dataclass(frozen=True)
class _Piece:
    """A piece of a dialog."""

    text: str
    is_control: bool = False  # the text is the name of a control token
    is_answer: bool = False  # the assistant wrote it


class LlamaFormat:
    """Dialogs with tools, and everything else that can be asked for a dialog, in Llama 3's format."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._plain = ChatFormat(tokenizer)
        self._unused = UnusedWarnings("Llama 3's chat format")

    def encode(self, dialog: Dialog, **options: Unpack[DialogOptions]) -> list[int] | None:
        """The ids of a dialog; None if the plain format says it all.

        Raises:
            LlamaError: as `ChatFormat.encode_dialog_prompt`; and for tools, where the model is Llama 3.0.
        """
        if not options and all(_is_plain(message) for message in dialog):
            return None
        pieces = self._write(dialog, options)
        return [token for piece in _merge(pieces) for token in self._encode_piece(piece)]

    def encode_rows(self, dialog: Dialog, **options: Unpack[DialogOptions]) -> list[DialogRow]:
        """One row to train on: the whole dialog, of which the assistant's messages and their ends are learnt."""
        self._write(dialog[:-1], options)  # an answer is to be one to something
        tokens: list[int] = []
        learnt: list[bool] = []
        for piece in _merge(self._write(dialog, {**options, "add_generation_prompt": False})):
            tokens += (ids := self._encode_piece(piece))
            learnt += [piece.is_answer] * len(ids)
        return [DialogRow(tokens, learnt)]

    def _encode_piece(self, piece: _Piece) -> list[int]:
        if piece.is_control:
            return [self.tokenizer.special_tokens[piece.text]]
        return self.tokenizer.encode(piece.text, bos=False, eos=False)

    def _write(self, dialog: Dialog, options: DialogOptions) -> list[_Piece]:
        options = gather_options(options, VARIABLES)
        messages = read_messages(dialog)
        variables = dict(options.get("chat_template_kwargs") or {})
        tools = variables.pop("custom_tools", None) or options.get("tools")
        has_calls = any("tool_calls" in message or message["role"] in _TOOL_ROLES for message in messages)
        is_extended = bool(tools or has_calls or VARIABLES & variables.keys())
        if is_extended and not self.tokenizer.is_llama_3_1:
            raise LlamaError(
                "the dialog has tools or calls of tools, which Llama 3 doesn't know: use a model of Llama 3.1 or later"
            )
        if options.get("documents"):
            raise LlamaError("Llama 3's format has no place for documents: put them into a message")
        for name in sorted(variables.keys() - VARIABLES):
            self._unused.tell(name)
        for message in messages:
            if message["role"] not in (*ROLES, *_TOOL_ROLES):
                self._plain.encode_dialog_prompt(dialog)  # says which role it is
        pieces = [_Piece("<|begin_of_text|>", is_control=True)]
        if is_extended:
            pieces += _write_extended(messages, tools, variables)
        else:
            pieces += [piece for message in messages for piece in _write_message(message["role"], _text_of(message))]
        if options.get("continue_final_message"):
            if messages[-1]["role"] in _TOOL_ROLES or "content" not in messages[-1]:
                raise LlamaError("continue_final_message goes on with the last message's text, and it has none")
            return pieces[:-1]
        begins = options.get("add_generation_prompt")
        return pieces if begins is False else [*pieces, *_write_header("assistant")]


def _is_plain(message: object) -> bool:
    """Whether `ChatFormat` writes this message, or refuses it, by itself."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return True
    plain_role = message["role"] not in _TOOL_ROLES
    return plain_role and isinstance(message.get("content"), str | None) and not message.get("tool_calls")


def _text_of(message: dict[str, Any]) -> str:
    return join_parts(message).get("content", "").strip()


def _write_header(role: str) -> Iterator[_Piece]:
    yield _Piece("<|start_header_id|>", is_control=True)
    yield _Piece(role)
    yield _Piece("<|end_header_id|>", is_control=True)
    yield _Piece("\n\n")


def _write_message(role: str, text: str, end: str = END_OF_TURN) -> Iterator[_Piece]:
    is_answer = role == "assistant"
    yield from _write_header(role)
    yield _Piece(text, is_answer=is_answer)
    yield _Piece(end, is_control=True, is_answer=is_answer)


def _write_extended(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
) -> Iterator[_Piece]:
    """The messages of a dialog after begin_of_text, as the published template of Llama 3.1 writes them.

    variables: those of the template, in VARIABLES.
    """
    builtin = variables.get("builtin_tools")
    in_user = variables.get("tools_in_user_message", True)
    listed = "".join(_to_json(tool, indent=4) + "\n\n" for tool in tools or ())
    system = ""
    if messages[0]["role"] == "system":
        system, messages = _text_of(messages[0]), messages[1:]
    lines = ["Environment: ipython\n"] if builtin is not None or tools else []
    if builtin is not None:
        lines.append(f"Tools: {', '.join(name for name in builtin if name != 'code_interpreter')}\n\n")
    lines.append(
        f"Cutting Knowledge Date: December 2023\nToday Date: {variables.get('date_string', '26 Jul 2024')}\n\n"
    )
    if tools and not in_user:
        lines += [_IN_SYSTEM, _EXPLANATION, listed]
    yield from _write_message("system", "".join([*lines, system]))
    if tools and in_user:
        if not messages:
            raise LlamaError("tools stand in the first message after the system message, and there is none")
        yield from _write_message("user", _IN_USER + _EXPLANATION + listed + _text_of(messages[0]))
        messages = messages[1:]
    for message in messages:
        if message.get("tool_calls"):
            yield from _write_call(message["tool_calls"], builtin)
        elif message["role"] in _TOOL_ROLES:
            yield from _write_message("ipython", _to_json(message.get("content", "")))
        else:
            yield from _write_message(message["role"], _text_of(message))


def _write_call(calls: Any, builtin: Sequence[str] | None) -> Iterator[_Piece]:
    """A message of the assistant that calls a tool: <|python_tag|>NAME.call(...) for one of its own, else JSON."""
    match calls:
        case [{"function": {"name": str(name), "arguments": arguments}}]:
            pass
        case [_]:
            raise LlamaError(
                f"tool_calls has {describe(calls[0])}; expected a dict with function, its name and arguments"
            )
        case _:
            raise LlamaError(f"tool_calls is {describe(calls)}; Llama 3.1 makes a single call in a message")
    yield from _write_header("assistant")
    if builtin is not None and name in builtin:
        if not isinstance(arguments, Mapping) or not all(isinstance(value, str) for value in arguments.values()):
            raise LlamaError(f"the arguments of {name} are {describe(arguments)}; expected a dict of texts")
        yield _Piece("<|python_tag|>", is_control=True, is_answer=True)
        given = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
        yield _Piece(f"{name}.call({given})", is_answer=True)
    else:
        yield _Piece(f'{{"name": "{name}", "parameters": {_to_json(arguments)}}}', is_answer=True)
    # With tools of its own, the model is in an environment that it goes on in.
    yield _Piece(END_OF_TURN if builtin is None else END_OF_MESSAGE, is_control=True, is_answer=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise LlamaError(f"a tool, call or answer isn't JSON ({error})") from None


def _merge(pieces: Sequence[_Piece]) -> Iterator[_Piece]:
    """The pieces, with texts between control tokens in one, since how a word is split depends on what is beside it.

    Where an answer begins they are never one: it follows a line's end.
    """
    text = ""
    is_answer = False
    for piece in pieces:
        if piece.is_control or piece.is_answer != is_answer:
            if text:
                yield _Piece(text, is_answer=is_answer)
            text, is_answer = "", piece.is_answer
        if piece.is_control:
            yield piece
        else:
            text += piece.text
    if text:
        yield _Piece(text, is_answer=is_answer)
