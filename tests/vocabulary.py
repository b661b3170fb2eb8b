"""A vocabulary of a few hundred tokens, and text that is likely to trip a tokenizer: what tokenizer tests share."""

import base64
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MERGES = [b"th", b"the", b" t", b" the", b"in", b"ing", b"  ", b"    ", b"\n\n", b"us", b"er", b"user", b"<|", b"|>"]
MERGES += ["é".encode(), "😀".encode()[:2], "😀".encode()[:3], "中".encode()[1:]]
TOKENS = [bytes([255 - i]) for i in range(256)] + MERGES
BASE = len(TOKENS)
SPECIALS = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    **{f"<|reserved_special_token_{i}|>": 2 + i for i in range(4)},
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|reserved_special_token_4|>": 8,
    "<|eot_id|>": 9,
    **{f"<|reserved_special_token_{i}|>": 5 + i for i in range(5, 251)},
}
SENTENCE = "This is a test sentence."
SENTENCE_IDS = [2028, 374, 264, 1296, 11914, 13]


def lines_of(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def write(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
some = settings(unhurried, max_examples=30)

# Text that is likely to trip a tokenizer: control tokens' names, white space, contractions, many alphabets.
texts = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from([*SPECIALS][:12]),
        st.sampled_from(["the", " the", "  ", "\n\n", "\r\n", "'LL", "1234", "😀", "中文", "e\u0301", "\x00", "\x1c"]),
    )
).map("".join)
