"""A conversation that stays in the KV cache: each turn prefills only what has changed since the last one.

Knows requests; knows no dialog and no text.
"""

from collections import abc
from collections.abc import Generator
from typing import Any

from .engine.request import Request
from .engine.sequence import OutputOptions, Step
from .engine.sequence_maker import CallOptions
from .engine.speculative import SPECULATE_K
from .generation import Llama


class Session:
    """One conversation with a `Llama`. Others may go on meanwhile; what they need of the cache may be taken from it.

    On several ranks every rank makes the same calls.
    """

    def __init__(self, llama: Llama):
        self.reused = 0  # tokens of the last prompt that the cache already held
        self.prefilled = 0  # tokens of the last prompt that it didn't hold
        self._engine = llama.engine

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
        options = CallOptions(OutputOptions(logprobs), 1, lookup_ngram, speculate_k, reuse=True)
        (request,) = self._engine.make_requests([prompt_tokens], shared, None, options)
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[Step, None, None]:
        for steps in self._engine.stream([request]):
            self.reused = request.reused
            self.prefilled = len(request.sequence.prompt) - self.reused
            yield from steps
