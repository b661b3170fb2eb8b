"""Token ids with offsets: the characters of the caller's text that each token stands for.

Knows tokenizers; knows no tensors and no model.
"""

from collections.abc import Sequence
from itertools import accumulate

from .hf_tokenizer import HFTokenizer, replace_surrogates
from .protocol import AnyTokenizer

Offsets = list[tuple[int, int]]  # of each token: it stands for the characters text[start:end]


def encode_with_offsets(tokenizer: AnyTokenizer, text: str, bos: bool) -> tuple[list[int], Offsets]:
    """(`tokenizer.encode(text, bos=bos, eos=False)`, the offsets of each id).

    Starts never decrease, and neither do ends. A token of some of a character's bytes has the offsets of the whole
    character. A character that normalization merges into the one before it (a combining mark, in NFC) goes with that
    one. A token without characters, such as the space that SentencePiece puts before a text, has start = end; tokens
    that `bos` puts before the text have (0, 0). The vocabulary must encode every character: as bytes, or as an unknown
    token.
    """
    prefix = tokenizer.encode("", bos=bos, eos=False)
    if isinstance(tokenizer, HFTokenizer):
        read = replace_surrogates(text)
        ids, offsets = _align_by_library(tokenizer, read)
    else:
        ids, offsets, read = _align_by_bytes(tokenizer, text)
    starts = _find_starts(text, read)
    return prefix + ids, [(0, 0)] * len(prefix) + [(starts[start], starts[end]) for start, end in offsets]


def _align_by_bytes(tokenizer: AnyTokenizer, text: str) -> tuple[list[int], Offsets, str]:
    """(ids, offsets, the text that the offsets are of), for tokens whose bytes, joined, are the text's."""
    ids = tokenizer.encode(text, bos=False, eos=False)
    pieces = [tokenizer.decode_bytes(token) for token in ids]
    read = b"".join(pieces)
    counts = list(accumulate(int(byte & 0xC0 != 0x80) for byte in read))  # of characters, up to and with each byte
    ends = accumulate(map(len, pieces))
    offsets = [(counts[end - len(piece)] - 1, counts[end - 1]) for piece, end in zip(pieces, ends, strict=True)]
    return ids, offsets, read.decode()


def _align_by_library(tokenizer: HFTokenizer, text: str) -> tuple[list[int], Offsets]:
    """(ids, offsets), as the library has them, with two corrections.

    Where normalization composed characters, the library's offsets hold only the first: here the others are added. A
    space that was put before a text gets no characters, instead of those of the next token.
    """
    encoding = tokenizer.encoding([text])
    starts = [start for start, _ in encoding.offsets] + [len(text)]
    ends = [0] + [end for _, end in encoding.offsets]
    rest = {end: start for end, start in zip(ends, starts, strict=True) if end < start}
    offsets = []
    for token, (start, end), following in zip(encoding.ids, encoding.offsets, starts[1:], strict=True):
        is_added = start == following and not tokenizer.decode_bytes(token).strip(b" ")
        offsets.append((start, start if is_added else rest.get(end, end)))
    return encoding.ids, offsets


def _find_starts(text: str, read: str) -> Sequence[int]:
    """Where each character of `read` starts in `text`, and where the last one ends.

    read: `text`, with one character for each pair of surrogates.
    """
    if len(read) == len(text):
        return range(len(text) + 1)
    starts = [0]
    for character in read:
        pair = character > "\uffff" and "\ud800" <= text[starts[-1]] <= "\udfff"
        starts.append(starts[-1] + 1 + pair)
    return starts
