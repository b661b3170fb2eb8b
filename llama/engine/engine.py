"""Requests to a model: prompts and settings in, steps of sequences out.

Everything that generates goes through `Engine.make_sequences` and `Engine.run`, or through `Engine.search_beams`. Knows
the model and the tokenizer; knows no file and no dialog.
"""

from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .. import parallel
from .._util.validate import check_count
from ..model import Transformer
from ..sampling import Context, apply_logits_processors
from ..settings import Settings, settings_of_rows
from ..tokenization.protocol import AnyTokenizer
from .beam_search import Beams, beam_search
from .model_runner import ModelRunner, OutputOptions, settle
from .outputs import Completion
from .request_checks import check_prompts, check_speculation, check_token_ids
from .seeds import SequenceSeeds
from .sequence import Sequence, Step
from .speculative import DraftProposer, make_lookup_proposer, run_speculative
from .stop_strings import StopFinder


class Engine:
    """What a `Llama` generates with. On several ranks, every rank makes the same calls."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        seed: int,
        prefill_chunk: int,
        draft: Transformer | None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk  # tokens of prompts in one forward pass
        self.runner = ModelRunner(model, prefill_chunk)
        self._draft_proposer = None if draft is None else DraftProposer(draft, prefill_chunk)
        self._seeds = SequenceSeeds(seed)

    def make_sequences(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        shared: Mapping[str, Any],
        rows: abc.Sequence[Mapping[str, Any] | None] | None = None,
        n: int = 1,
        top_logprobs: int = 0,
    ) -> list[Sequence]:
        """n sequences from each prompt. shared: settings of all; rows: those of each. Raises LlamaError."""
        with parallel.raise_together(parallel.group()):
            check_count("n", n)
            check_prompts(prompt_tokens, self.model.params, n)
            all_settings = settings_of_rows(len(prompt_tokens), shared, rows)
            check_token_ids(all_settings, top_logprobs, self.model.params.vocab_size)
        prompts = [[int(token) for token in prompt] for prompt in prompt_tokens]
        pairs = enumerate(zip(prompts, all_settings, strict=True))
        return [self._make_sequence(i * n + j, *pair, j) for i, pair in pairs for j in range(n)]

    def run(
        self,
        sequences: list[Sequence],
        output: OutputOptions,
        lookup_ngram: int | None,
        speculate_k: int,
        cached: int = 0,
    ) -> Iterator[list[Step]]:
        """The sequences' steps, with proposals where there are any. cached: as in `ModelRunner.run`.

        Raises LlamaError for proposals that can't be made.
        """
        with parallel.raise_together(parallel.group()):
            check_speculation(lookup_ngram, speculate_k)
        propose = self._draft_proposer if lookup_ngram is None else make_lookup_proposer(lookup_ngram)
        if propose is None:
            return self.runner.run(sequences, output, cached)
        return run_speculative(self.runner, sequences, output, propose, speculate_k, cached)

    def search_beams(
        self, prompt_tokens: abc.Sequence[abc.Sequence[int]], beams: Beams, settings: Settings
    ) -> list[Completion]:
        """The best answers to the first prompt, then to the second ... Raises LlamaError."""
        with parallel.raise_together(parallel.group()):
            check_token_ids([settings], 0, self.model.params.vocab_size)
        stops = self._stop_tokens(settings)

        def process(logprobs: Tensor, prompt: abc.Sequence[int], answer: abc.Sequence[int]) -> Tensor:
            return apply_logits_processors(logprobs, settings, Context(prompt, answer, stops))

        self.runner.claim_cache()
        with settle(self.model, settings.logits_processor is not None):
            best = beam_search(
                self.model,
                prompt_tokens,
                beams,
                settings.max_gen_len or self.model.params.max_seq_len,
                stops,
                process if settings.changes_logits else None,
                self.prefill_chunk,
            )
        return [
            Completion(list(prompt), b.tokens, self.tokenizer.decode(b.tokens), b.finish_reason, b.stop, score=b.score)
            for prompt, prompt_beams in zip(prompt_tokens, best, strict=True)
            for b in prompt_beams
        ]

    def _stop_tokens(self, settings: Settings) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokenizer.stop_tokens) | {*settings.stop_token_ids}

    def _make_sequence(self, index: int, prompt: list[int], settings: Settings, copy: int) -> Sequence:
        """copy: its number among the sequences of this prompt."""
        room = self.model.params.max_seq_len - len(prompt)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=settings,
            stops=self._stop_tokens(settings),
            remaining=room if settings.max_gen_len is None else min(room, settings.max_gen_len),
            decoder=self.tokenizer.stream_decoder(),
            generator=self._seeds.make_generator(prompt, settings.seed, copy),
            stop_finder=StopFinder(settings.stop),
            cached=len(prompt),
        )
