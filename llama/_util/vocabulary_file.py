"""Vocabulary files of byte-pair encoding, as tiktoken has them: lines of "base64 rank", read with errors of one line.

Knows no tokenizer.
"""

import base64
import os

from ..errors import LlamaError, shorten
from .files import check_file

_EXPECTED = (
    "expected Llama 3's tokenizer.model, a text file of 'base64 rank' lines, or a tokenizer.json (not Llama 2's "
    "tokenizer.model)"
)


def read_vocabulary(path: str) -> dict[bytes, int]:
    """Token -> rank, from a local path or an object store's URL.

    Raises LlamaError, in one line, for what can't be read or isn't such a file.
    """
    return _parse_vocabulary(path, _read(path))


def _read(path: str) -> bytes:
    """The file's bytes as they are now: tiktoken's own loader would cache them by path."""
    import blobfile  # here, since its import takes longer than the rest of this file's

    if not os.path.isdir(path):  # its message is below
        check_file(path)
    try:
        return blobfile.read_bytes(path)
    except IsADirectoryError:
        here = [name for name in ("tokenizer.json", "tokenizer.model") if os.path.isfile(os.path.join(path, name))]
        name = here[0] if here else "tokenizer.model"
        raise LlamaError(f"{path}: found a directory; give the path of the {name} in it") from None
    except FileNotFoundError:
        raise LlamaError(f"{path}: no such file; {_EXPECTED}") from None
    except (OSError, ValueError, blobfile.Error) as error:
        reason = " ".join(str(error).split())
        raise LlamaError(f"{path}: the tokenizer can't be read ({reason}); {_EXPECTED}") from error


def _parse_vocabulary(path: str, data: bytes) -> dict[bytes, int]:
    """Token -> rank from lines of "base64 rank", in any order.

    Raises:
        LlamaError: the ranks aren't 0 .. n - 1, each once, or the tokens aren't distinct or lack a single byte.
    """
    if not data.strip():
        raise LlamaError(f"{path}: the file is empty; {_EXPECTED}")
    if data.lstrip().startswith(b"<"):
        raise LlamaError(f"{path}: found a web page (it starts with '<'), not a download of the file; {_EXPECTED}")
    if data.startswith(b"version https://git-lfs"):
        raise LlamaError(f"{path}: found a Git LFS pointer, not the file; fetch the file with `git lfs pull`")
    if _is_sentencepiece(data):
        raise LlamaError(
            f"{path}: found a SentencePiece model, as Llama 2's tokenizer.model is, which isn't read here; pass the "
            "tokenizer.json of the same model as tokenizer_path"
        )

    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = _parse_line(line)
            if token in ranks:
                raise LlamaError(f"the token {shorten(token)} already has line {line_of_rank[ranks[token]]}")
            if rank in line_of_rank:
                raise LlamaError(f"the rank {rank} already has line {line_of_rank[rank]}")
        except LlamaError as error:
            raise LlamaError(f"{path}, line {number}: {error}; {_EXPECTED}") from None
        ranks[token] = rank
        line_of_rank[rank] = number

    gap = next((rank for rank in range(len(ranks)) if rank not in line_of_rank), None)
    if gap is not None:
        raise LlamaError(
            f"{path}: {len(ranks)} tokens, but no rank {gap}; expected the ranks 0..{len(ranks) - 1}: get the file anew"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise LlamaError(
            f"{path}: {len(missing)} of the 256 single bytes are no tokens, the first 0x{missing[0]:02x}; "
            "expected all, so that any text can be encoded: get the file anew"
        )
    return ranks


def _is_sentencepiece(data: bytes) -> bool:
    """Whether `data` begins as SentencePiece's protocol buffers: a piece, which is text and score, and another one."""
    match list(data[:4]):
        case [0x0A, length, 0x0A, text_length]:
            score, following = 4 + text_length, 2 + length
            return data[score : score + 1] == b"\x15" and data[following : following + 1] == b"\n"
    return False


def _parse_line(line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2:
        raise LlamaError(f"found {shorten(line)}, {len(fields)} field(s) and not 2")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except ValueError as error:
        raise LlamaError(f"found {shorten(fields[0])}, which isn't base64 ({error})") from None
    if not (fields[1].isdigit() and len(fields[1]) < 10):
        raise LlamaError(f"found the rank {shorten(fields[1])}, which isn't a number from 0 up")
    return token, int(fields[1])
