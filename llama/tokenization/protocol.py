"""What every tokenizer and every chat format offers, whichever file it was read from: the types of callers' arguments.

`Tokenizer` and `HFTokenizer` are tokenizers; `ChatFormat` and `TemplateFormat` are chat formats.
"""

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Literal, Protocol, Unpack

from ..tokenizer import Dialog
from .messages import DialogOptions


class AnyStreamDecoder(Protocol):
    """Turns ids into text, one id at a time."""

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none."""

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete, else nothing. Afterwards the decoder is as new."""


class AnyTokenizer(Protocol):
    """Text to token ids and back."""

    n_words: int  # how many ids there are: 0 .. n_words - 1
    special_tokens: dict[str, int]  # name -> id of each control token
    bos_id: int  # of the token before a text; -1: there is none
    eos_id: int  # of the token after a text; -1: there is none
    pad_id: int  # -1, which is no token
    stop_tokens: set[int]  # the ids that end a generation

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """The ids of a text, in which no control token is made unless `allowed_special` names it."""

    def decode(self, t: Sequence[int]) -> str:
        """The text of these ids; bytes that aren't UTF-8 are U+FFFD."""

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one id, which needn't be whole UTF-8 characters."""

    def stream_decoder(self) -> AnyStreamDecoder:
        """A decoder for ids that come one at a time."""


class AnyChatFormat(Protocol):
    """Dialogs as a model was trained on them."""

    @property
    def end_of_turn(self) -> int:
        """The id that ends a message."""

    def encode_dialog_prompt(self, dialog: Dialog, **options: Unpack[DialogOptions]) -> list[int]:
        """The ids of a dialog, up to where the assistant's answer begins."""


@dataclass(frozen=True)
class DialogRow:
    """A dialog to train on, or a part of one that ends with an answer."""

    tokens: list[int]
    learnt: list[bool]  # of each token: whether it is to be learnt
