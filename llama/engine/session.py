"""A conversation that stays in the KV cache: a further turn prefills only what is new, an edited one what has changed.

Knows rows and the cache; knows no dialog and no text.
"""

from collections import abc
from collections.abc import Generator
from typing import TYPE_CHECKING, Unpack

from ..settings import Options
from .engine import OutputOptions
from .sequence import Sequence, Step, in_common
from .speculative import SPECULATE_K

if TYPE_CHECKING:
    from ..generation import Llama


class Session:
    """One row of a Llama, from turn to turn. What else that Llama does in between takes the cache from it.

    reused, prefilled: of the last prompt, the tokens that were in the cache, and those that weren't.
    """

    def __init__(self, llama: "Llama"):
        self.reused = self.prefilled = 0
        self._llama = llama
        self._cached: list[int] = []  # tokens whose keys and values the first slot has
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
        **options: Unpack[Options],
    ) -> Generator[Step, None, None]:
        """As `Llama.stream` of one prompt, the whole conversation so far; the same tokens, sooner."""
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **options}
        (row,) = self._llama.rows([prompt_tokens], 1, shared, None, 0)
        return self._stream(row, OutputOptions(logprobs), lookup_ngram, speculate_k)

    def _stream(
        self, row: Sequence, output: OutputOptions, lookup_ngram: int | None, speculate_k: int
    ) -> Generator[Step, None, None]:
        engine = self._llama.engine
        self.reused = self._reusable(row.prompt) if engine.current is self._ticket else 0
        self.prefilled = len(row.prompt) - self.reused
        self._cached = []  # what stands there if anything fails
        try:
            for steps in self._llama.steps([row], output, lookup_ngram, speculate_k, self.reused):
                self._ticket = engine.current
                yield from steps
        except GeneratorExit:  # a caller who has heard enough
            self._cached = (row.prompt + row.answer)[: row.cached]
            raise
        self._cached = (row.prompt + row.answer)[: row.cached]

    def _reusable(self, prompt: abc.Sequence[int]) -> int:
        """How many tokens the prompt begins with that are cached: all but its last, whose logits are wanted, at most.

        Where angles depend on a row's length, what is cached was turned by others: none.
        """
        scaling = self._llama.model.params.rope_scaling
        if scaling is not None and scaling.type == "dynamic":
            return 0
        return in_common(self._cached, prompt[:-1])
