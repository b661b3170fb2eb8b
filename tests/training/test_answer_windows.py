"""Answers at every place of a long context: a window's target is the answer if all of it is in the window."""

from datetime import datetime

import pytest

from llama.tokenization.chat_template import make_formatter
from llama.tokenizer import Tokenizer
from llama.training.preprocessing import Preprocessor, read_answer

CONTEXT = "abcd" * 60  # each letter is a token


@pytest.mark.parametrize("length", [1, 2])
def test_every_place(small: Tokenizer, length: int) -> None:
    ids = small.encode(CONTEXT, bos=False, eos=False)
    question = [small.bos_id, *small.encode("who", bos=False, eos=False), small.bos_id]
    assert len(ids) == len(CONTEXT)
    preprocessor = Preprocessor(small, make_formatter(small, datetime(2001, 2, 3)), {}, len(question) + 140)
    starts = range(0, 109, 12)  # of windows of 140 that have 128 in common
    for first in range(len(CONTEXT) - length + 1):
        last = first + length - 1
        answer = {"text": CONTEXT[first : last + 1], "start": first}
        record = {"question": "who", "context": CONTEXT, "answers": [answer]}
        for start, example in zip(starts, read_answer(preprocessor, record), strict=True):
            end = min(start + 140, len(CONTEXT))
            assert example.tokens == question + ids[start:end]
            shift = len(question) - start
            expected = (first + shift, last + shift) if start <= first and last < end else (0, 0)
            assert example.target == expected
