"""Texts and dialogs that a model reads as a whole, to score, embed or label them: their ids, first to last.

Knows tokenizers and chat formats; knows no model.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Literal, TypedDict

from ..errors import LlamaError, shorten
from ..tokenizer import Dialog
from .hf_tokenizer import HFTokenizer
from .protocol import AnyChatFormat, AnyTokenizer
from .surroundings import Surroundings

Text = str | Dialog


class TextOptions(TypedDict, total=False):
    """Keyword arguments of whoever encodes texts."""

    allowed_special: Literal["all"] | Set[str]  # control tokens whose names in texts become those tokens; default: none


def around_text(tokenizer: AnyTokenizer) -> Surroundings:
    """What the tokenizer puts around a text."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.around_text
    return Surroundings(before=tuple(tokenizer.encode("", bos=True, eos=False)))


def around_pair(tokenizer: AnyTokenizer) -> Surroundings:
    """What the tokenizer puts around and between two texts. Raises LlamaError if it can't be used."""
    if isinstance(tokenizer, HFTokenizer):
        if tokenizer.around_pair is None:
            raise LlamaError("the tokenizer.json puts the second text of a pair before the first; expected their order")
        tokenizer.check_usable(
            *tokenizer.around_pair.before, *tokenizer.around_pair.between, *tokenizer.around_pair.after
        )
        return tokenizer.around_pair
    before = around_text(tokenizer).before
    return Surroundings(before, between=before)


def encode_whole(
    tokenizer: AnyTokenizer, text: str, allowed_special: Literal["all"] | Set[str] = frozenset()
) -> list[int]:
    """The ids of a text with what the tokenizer puts around it.

    A text that has those tokens itself, by names that are allowed, doesn't get them twice.
    """
    around = around_text(tokenizer)
    ids = tokenizer.encode(text, bos=False, eos=False, allowed_special=allowed_special)
    before = [] if allowed_special and tuple(ids[: len(around.before)]) == around.before else around.before
    after = (
        [] if allowed_special and tuple(ids[max(0, len(ids) - len(around.after)) :]) == around.after else around.after
    )
    return [*before, *ids, *after]


def encode_inputs(
    tokenizer: AnyTokenizer,
    formatter: AnyChatFormat | None,
    texts: Sequence[Text],
    allowed_special: Literal["all"] | Set[str] = frozenset(),
) -> list[list[int]]:
    """The ids of each text, as `encode_whole`, and of each dialog, as its template writes it, up to the last message.

    Raises LlamaError, with the place in the list, for what is neither, for a text that is empty or has no token, and
    for a dialog where there is no formatter.
    """
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str | list | tuple) for text in texts):
        one = isinstance(texts, list | tuple) and all(isinstance(message, Mapping) for message in texts)
        advice = "put the one dialog into a list, [dialog]" if one else "expected a list of strings, or of dialogs"
        raise LlamaError(f"texts is {shorten(texts)}, {advice}")
    rows = []
    for i, text in enumerate(texts):
        if text == "":
            raise LlamaError(f"text {i} is empty: give it at least one character")
        if isinstance(text, str):
            row = encode_whole(tokenizer, text, allowed_special)
        else:
            row = _encode_dialog(formatter, text, i)
        if not row:
            raise LlamaError(f"text {i}, {shorten(text)}, has no token: expected at least one")
        rows.append(row)
    return rows


def _encode_dialog(formatter: AnyChatFormat | None, dialog: Dialog, i: int) -> list[int]:
    if formatter is None:
        raise LlamaError(f"text {i} is a dialog, and there is no formatter to write it: pass one")
    try:
        return formatter.encode_dialog_prompt(dialog, add_generation_prompt=False)
    except LlamaError as error:
        raise LlamaError(f"text {i}: {error}") from None
