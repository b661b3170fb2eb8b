"""A conversation that stays in the KV cache: each turn prefills only what has changed since the last one.

Knows sequences and what the cache holds; knows no dialog and no text.
"""

from collections import abc
from collections.abc import Generator
from typing import Any

from .engine.model_runner import OutputOptions
from .engine.sequence import Sequence, Step, count_common_prefix
from .engine.speculative import SPECULATE_K
from .generation import Llama


class Session:
    """One conversation with a `Llama`. Any other call on that `Llama` takes the KV cache; the next turn is then slower.

    On several ranks every rank makes the same calls.
    """

    def __init__(self, llama: Llama):
        self.reused = 0  # tokens of the last prompt that the cache already held
        self.prefilled = 0  # tokens of the last prompt that it didn't hold
        self._engine = llama.engine
        self._cached: list[int] = []  # the tokens that the first slot holds
        self._ticket: object = None  # of the stream that wrote them

    def stream(
        self,
        prompt_tokens: abc.Sequence[int],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        *,
        lookup_ngram: int | None = None,
        speculate_k: int = SPECULATE_K,
        **settings: Any,
    ) -> Generator[Step, None, None]:
        """Generate as `Llama.stream` does from one prompt, the whole conversation so far: the same tokens, sooner."""
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **settings}
        (sequence,) = self._engine.make_sequences([prompt_tokens], shared)
        return self._stream(sequence, OutputOptions(logprobs), lookup_ngram, speculate_k)

    def _stream(
        self, sequence: Sequence, output: OutputOptions, lookup_ngram: int | None, speculate_k: int
    ) -> Generator[Step, None, None]:
        runner = self._engine.runner
        self.reused = self._count_reusable(sequence.prompt) if runner.cache_owner is self._ticket else 0
        self.prefilled = len(sequence.prompt) - self.reused
        self._cached = []  # if anything fails, nothing in the slot is relied on
        try:
            for steps in self._engine.run([sequence], output, lookup_ngram, speculate_k, self.reused):
                self._ticket = runner.cache_owner
                yield from steps
        except GeneratorExit:  # the caller stopped listening
            self._cached = (sequence.prompt + sequence.answer)[: sequence.cached]
            raise
        self._cached = (sequence.prompt + sequence.answer)[: sequence.cached]

    def _count_reusable(self, prompt: abc.Sequence[int]) -> int:
        """How many of the prompt's first tokens are cached. Its last token never counts: its logits are needed.

        0 with dynamic rotary scaling, where the angles in the cache depend on the length that the sequence had.
        """
        scaling = self._engine.model.params.rope_scaling
        if scaling is not None and scaling.type == "dynamic":
            return 0
        return count_common_prefix(self._cached, prompt[:-1])
