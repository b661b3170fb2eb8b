"""Dialogs as rows to train on: the ids that the template gives, and which of them are learnt.

Learnt is what a template marks by {% generation %}; else the assistant's messages, from where the prompt of each ends
to the token that ends it. Knows chat formats; knows no records and no tensors.
"""

import re
from typing import Unpack, cast

from ..errors import LlamaError
from ..tokenizer import ChatFormat, Dialog
from .hf_tokenizer import HFTokenizer
from .llama_format import LlamaFormat
from .messages import DialogOptions
from .protocol import AnyChatFormat, DialogRow
from .template_format import TemplateFormat
from .template_text import GIVEN, KIND, LEARNT, SPOKEN, Text, origins_of

Span = tuple[int, int]  # start and end, in characters
_MARKED = re.compile(b"[%c-%c]+" % (LEARNT, LEARNT | KIND))  # origins with that flag


def encode_rows(formatter: AnyChatFormat, dialog: Dialog, **options: Unpack[DialogOptions]) -> list[DialogRow]:
    """The rows of a dialog, token for token as the template encodes it.

    A row ends with an answer, and has what generation meets before that. There is one for the whole dialog. An earlier
    answer that the template writes otherwise there (without its thoughts, say) is learnt in a row of its own.

    Raises:
        LlamaError: as `encode_dialog_prompt`; and if it isn't to be seen where an answer begins.
    """
    if isinstance(formatter, ChatFormat):
        return LlamaFormat(formatter.tokenizer).encode_rows(dialog, **options)
    return _TemplateRows(cast(TemplateFormat, formatter), dialog, options).encode()


class _TemplateRows:
    def __init__(self, formatter: TemplateFormat, dialog: Dialog, options: DialogOptions) -> None:
        self._format, self._dialog, self._options = formatter, dialog, options

    def encode(self) -> list[DialogRow]:
        whole = self._render(len(self._dialog))
        if marked := _find_marked(whole):
            return [self._encode_row(whole, marked)]
        spans, rows = [], []
        for number, message in enumerate(self._dialog):
            is_last = number == len(self._dialog) - 1
            if message["role"] != "assistant" or (number == 0 and not is_last):
                continue  # what the assistant says first of all answers nothing
            text = whole if is_last else self._render(number + 1)
            span = self._find_answer(number, text)
            if whole.startswith(text[: span[1]]):
                spans.append(span)
            else:
                rows.append(self._encode_row(text, [span]))
        return [*rows, self._encode_row(whole, spans)]

    def _render(self, count: int, *, is_prompt: bool = False) -> Text:
        """The first `count` messages."""
        options: DialogOptions = {**self._options, "add_generation_prompt": is_prompt}
        return self._format.render(self._dialog[:count], **options)

    def _find_answer(self, number: int, text: Text) -> Span:
        """Where the answer that is message `number` is in `text`, the dialog up to and with it.

        It begins where the prompt ends; if the template writes a prompt that the answer doesn't begin with, such as
        <think>, where the two part.
        """
        prompt = self._render(number, is_prompt=True)
        start = _count_common(prompt, text)
        if start < len(prompt):
            before = self._render(number)
            if start < _count_common(prompt, before):
                raise LlamaError(
                    f"message {number + 1} of {len(self._dialog)}: the chat template writes the messages before it "
                    "otherwise when it follows, so it isn't known where it begins; mark it there by {% generation %}"
                )
        given = [i for i in range(start, len(text)) if origins_of(text)[i] & KIND in (GIVEN, SPOKEN)]
        content_end = given[-1] + 1 if given else start
        ends = [(end, token) for begin, end, token in self._format.find_tokens(text) if begin >= content_end]
        stops = [end for end, token in ends if token in self._format.tokenizer.stop_tokens]
        return start, stops[0] if stops else ends[-1][0] if ends else len(text)

    def _encode_row(self, text: Text, spans: list[Span]) -> DialogRow:
        tokenizer = self._format.tokenizer
        placed = _place_tokens(tokenizer, self._format.split(text))
        learnt = [any(start < stop and end > begin for begin, stop in spans) for _, start, end in placed]
        return DialogRow([token for token, _, _ in placed], learnt)


def _count_common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if other.startswith(str.__str__(one[:middle])) else (least, middle - 1)
    return least


def _find_marked(text: Text) -> list[Span]:
    """The longest pieces of a text that stand in {% generation %}."""
    return [match.span() for match in _MARKED.finditer(origins_of(text))]


def _place_tokens(tokenizer: HFTokenizer, parts: list[str | int]) -> list[tuple[int, int, int]]:
    """(id, start, end) of each token: the characters that it stands for, where control tokens have their names.

    For the library they have other names, all of one length, whose places are translated here.
    """
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    control = next((part for part in parts if isinstance(part, int)), None)
    alias_size = 0 if control is None else tokenizer.encoding([control]).offsets[0][1]
    starts: list[int] = []  # of each character for the library, in the text
    ends: list[int] = []
    place = 0
    for part in parts:
        size, length = (alias_size, len(names[part])) if isinstance(part, int) else (len(part), len(part))
        starts += [place] * size if isinstance(part, int) else range(place, place + size)
        ends += [place + length] * size if isinstance(part, int) else range(place + 1, place + size + 1)
        place += length
    encoding = tokenizer.encoding(parts)
    return [
        (token, starts[start], ends[end - 1]) if end > start else (token, place, place)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
