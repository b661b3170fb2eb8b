"""Penalties through `generate`, on logits that a hook makes the same in every step: what is counted is then plain.

The oracle is a loop by hand over OpenAI's definition: presence and frequency count the answer, and never the prompt.
https://platform.openai.com/docs/api-reference/chat/create
"""

from typing import Any

import pytest
import torch
from tiny import write_checkpoint
from torch import Tensor

from llama import Llama

PROMPT = [5, 5, 5, 6, 6, 7]  # the likeliest tokens, so that penalties on them would change the answer
LIKELY = {5: 4.0, 6: 3.9, 7: 3.8, 8: 3.0, 9: 2.9}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    llama = Llama.build(
        write_checkpoint(tmp_path_factory.mktemp("penalties")), max_seq_len=64, device="cpu", dtype="float32"
    )

    def set_logits(module: Any, args: Any, logits: Tensor) -> Tensor:
        same = torch.zeros_like(logits)
        for token, value in LIKELY.items():
            same[..., token] = value
        return same

    llama.model.register_forward_hook(set_logits)
    return llama


def penalize_by_hand(steps: int, presence: float, frequency: float) -> list[int]:
    answer: list[int] = []
    for _ in range(steps):
        scores = {t: x - frequency * answer.count(t) - presence * (t in answer) for t, x in LIKELY.items()}
        answer.append(max(scores, key=lambda token: scores[token]))
    return answer


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.3), (0.25, 0.4), (-1.0, 0.0), (0.0, -0.2)])
@pytest.mark.parametrize("options", [{}, {"lookup_ngram": 1}, {"n": 2}])
def test_presence_and_frequency_count_the_answer_only(
    llama: Llama, presence: float, frequency: float, options: dict[str, Any]
) -> None:
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    tokens, _ = llama.generate([PROMPT], 12, temperature=0, **penalties, **options)
    assert tokens == [penalize_by_hand(12, presence, frequency)] * len(tokens)


def test_repetition_counts_prompt_and_answer(llama: Llama) -> None:
    """As in transformers: the tokens of the prompt are divided from the first step on."""
    tokens, _ = llama.generate([PROMPT], 3, temperature=0, repetition_penalty=1.5)
    assert tokens == [[8, 9, 5]]
