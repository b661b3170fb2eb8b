"""The bytes that a word of a tokenizer.json's vocabulary stands for, by the file's "decoder".

Knows no ids and no library.
"""

import re
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from ..errors import LlamaError, shorten

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # the token of a byte, for characters that are no tokens


class Pieces:
    """The bytes of the vocabulary's pieces, which are in one of two notations, or are words.

    GPT-2's has a letter for each byte ("ByteLevel"). SentencePiece's has "▁" for a space, and with "ByteFallback" names
    such as <0x0A> for single bytes; and it puts a space before every text, or several (`lead` of them). Without a
    decoder pieces are words, with a space between any two: each gets one before it, and the first of a text is a lead.
    """

    def __init__(self, path: Path, decoder: Any) -> None:
        """Read the "decoder" of a tokenizer.json. Raises LlamaError if it is neither notation."""
        self.lead = int(decoder is None)
        self.before = b" " if decoder is None else b""  # of every piece, control tokens included
        self._letters: dict[str, int] | None = None
        # What each step does to a piece, which ends where it is a byte. Past "Fuse" there are no pieces.
        self._changes: list[Callable[[str], str | bytes]] = []
        is_fused = False
        for step in [] if decoder is None else _steps(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._letters = byte_letters()
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    self._changes.append(methodcaller("replace", old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    self._changes.append(methodcaller("replace", old, " "))
                    self.lead += step.get("prepend_scheme") != "never"
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                    self.lead += start
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    self._changes.append(partial(_strip, start))
                case {"type": "Fuse"}:
                    is_fused = True
                case {"type": "ByteFallback"}:
                    self._changes += [] if is_fused else [_find_byte]
                case _:
                    raise LlamaError(
                        f"{path}: 'decoder' has the step {shorten(step)}; expected GPT-2's ByteLevel, or "
                        "SentencePiece's Replace, ByteFallback, Fuse, Strip and Metaspace"
                    )

    def decode(self, piece: str) -> bytes:
        """The bytes of a piece inside a text."""
        if self._letters is not None:
            codes = [self._letters[letter] for letter in piece if letter in self._letters]
            return bytes(codes) if len(codes) == len(piece) else piece.encode()
        for change in self._changes:
            changed = change(piece)
            if isinstance(changed, bytes):
                return changed
            piece = changed
        return self.before + piece.encode()


def byte_letters() -> dict[str, int]:
    """GPT-2's letter -> byte: visible letters of Latin-1 stand for themselves, those from U+0100 on for other bytes."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def strip_lead(text: str, lead: int) -> tuple[str, int]:
    """Strip up to `lead` spaces off the start; returns the rest, and how many may be stripped off what follows."""
    kept = text.removeprefix(" ") if lead else text
    if not lead or kept == text:
        return text, 0 if text else lead
    return strip_lead(kept, lead - 1)


def _steps(decoder: Any) -> list[Any]:
    match decoder:
        case {"type": "Sequence", "decoders": list(steps)}:
            return [inner for step in steps for inner in _steps(step)]
        case _:
            return [decoder]


def _find_byte(piece: str) -> str | bytes:
    return bytes([int(piece[3:5], base=16)]) if BYTE.fullmatch(piece) else piece


def _strip(most: int, piece: str) -> str:
    return strip_lead(piece, most)[0]
