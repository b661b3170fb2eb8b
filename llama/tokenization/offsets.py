"""Where in the caller's text each token stands: ids with offsets, by either tokenizer.

Knows tokenizers; knows no tensors and no model.
"""

from collections.abc import Sequence
from itertools import accumulate

from ..tokenizer import Tokenizer
from .hf_tokenizer import HFTokenizer, without_surrogates

Offsets = list[tuple[int, int]]  # of each token: the characters of a text that it stands for, [start, end)


def encode_with_offsets(tokenizer: Tokenizer | HFTokenizer, text: str, bos: bool) -> tuple[list[int], Offsets]:
    """`tokenizer.encode(text, bos=bos, eos=False)`, and for each id the characters text[start:end] it stands for.

    Neither starts nor ends ever go back. A part of a character's bytes has the whole character; a character that
    normalization puts into the one before it (a combining mark, in NFC) goes with it. A token that stands for no
    character, as the space that SentencePiece puts before a text, is empty: start = end. What `bos` puts before the
    text has (0, 0). The vocabulary must have something for every character: bytes, or an unknown token.
    """
    prefix = tokenizer.encode("", bos=bos, eos=False)
    if isinstance(tokenizer, HFTokenizer):
        read = without_surrogates(text)
        ids, offsets = _by_alignment(tokenizer, read)
    else:
        ids, offsets, read = _by_bytes(tokenizer, text)
    starts = _starts(text, read)
    return prefix + ids, [(0, 0)] * len(prefix) + [(starts[start], starts[end]) for start, end in offsets]


def _by_bytes(tokenizer: Tokenizer, text: str) -> tuple[list[int], Offsets, str]:
    """Ids, offsets, and the text that the offsets are of: the tokens' bytes are those of the text, in their order."""
    ids = tokenizer.encode(text, bos=False, eos=False)
    pieces = [tokenizer.decode_bytes(token) for token in ids]
    read = b"".join(pieces)
    begun = list(accumulate(int(byte & 0xC0 != 0x80) for byte in read))  # characters, up to each byte and with it
    ends = accumulate(map(len, pieces))
    offsets = [(begun[end - len(piece)] - 1, begun[end - 1]) for piece, end in zip(pieces, ends, strict=True)]
    return ids, offsets, read.decode()


def _by_alignment(tokenizer: HFTokenizer, text: str) -> tuple[list[int], Offsets]:
    """Ids and offsets as the library aligns them, but for two things.

    Of characters that were composed it names the first alone: the rest goes with it. And a space that was put before a
    text has the place of what follows.
    """
    encoding = tokenizer.encoding([text])
    starts = [start for start, _ in encoding.offsets] + [len(text)]
    ends = [0] + [end for _, end in encoding.offsets]
    rest = {end: start for end, start in zip(ends, starts, strict=True) if end < start}
    offsets = []
    for token, (start, end), following in zip(encoding.ids, encoding.offsets, starts[1:], strict=True):
        put = start == following and not tokenizer.decode_bytes(token).strip(b" ")
        offsets.append((start, start if put else rest.get(end, end)))
    return encoding.ids, offsets


def _starts(text: str, read: str) -> Sequence[int]:
    """Where each character of `read` starts in `text`, and where the last ends: a pair of surrogates is read as one."""
    if len(read) == len(text):
        return range(len(text) + 1)
    starts = [0]
    for character in read:
        pair = character > "\uffff" and "\ud800" <= text[starts[-1]] <= "\udfff"
        starts.append(starts[-1] + 1 + pair)
    return starts
