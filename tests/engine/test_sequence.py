"""A sequence's steps: their texts, joined, are its tokens decoded together, however it ends."""

import pytest
import torch
from vocabulary import BASE, TOKENS

from llama.engine.sequence import OutputOptions, Sequence, Step
from llama.engine.stop_strings import StopFinder
from llama.settings import Settings
from llama.tokenizer import Tokenizer

STOP = BASE + 1
HALF = [TOKENS.index(bytes([byte])) for byte in "🙂".encode()[:3]]  # the beginning of a character
WORD = [TOKENS.index(b"a"), TOKENS.index(b"b")]


def run(tokenizer: Tokenizer, tokens: list[int], most: int, stops: tuple[str, ...] = ()) -> list[Step]:
    sequence = Sequence(
        index=0,
        prompt=[],
        settings=Settings(),
        stops=frozenset({STOP}),
        remaining=most,
        decoder=tokenizer.stream_decoder(),
        generator=torch.Generator(),
        stop_finder=StopFinder(stops),
        output=OutputOptions(),
        scope=None,
    )
    steps = []
    for token in tokens:
        steps.append(sequence.accept(token, None, None))
        if sequence.finish_reason is not None:
            break
    return steps


@pytest.mark.parametrize("held", [(), ("\ufffd\ufffd", "abc")])  # stops that the end of the text may begin
@pytest.mark.parametrize("end", [HALF, HALF[:1], WORD])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_nothing_of_the_text_is_lost_at_its_end(
    small: Tokenizer, reason: str, end: list[int], held: tuple[str, ...]
) -> None:
    tokens = [*WORD, *end]
    steps = run(small, [*tokens, STOP], len(tokens) + (reason == "stop"), held)
    assert "".join(step.text for step in steps) == small.decode(tokens)
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [reason]
    assert steps[-1].length == len(tokens) and len(steps) == len(tokens) + (reason == "stop")
