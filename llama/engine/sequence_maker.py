"""Sequences for the prompts of a call, and for texts that are only read.

Knows the tokenizer, random numbers and who proposes tokens; knows no model and no step.
"""

from collections import abc
from dataclasses import dataclass

import torch

from .. import parallel
from ..model import ModelArgs
from ..settings import Settings
from ..tokenization.protocol import AnyTokenizer
from .grammar import Grammars, Matcher
from .seeds import SequenceSeeds
from .sequence import Consume, ConsumeLogits, OutputOptions, Sequence
from .speculative import SPECULATE_K, DraftProposer, Proposer, make_lookup_proposer
from .stop_strings import StopFinder

PLAIN_OUTPUT, READ_SETTINGS = OutputOptions(), Settings()


@dataclass(frozen=True)
class CallOptions:
    """How all requests of a call are answered."""

    output: OutputOptions = PLAIN_OUTPUT
    n: int = 1  # requests to each prompt
    lookup_ngram: int | None = None
    speculate_k: int = SPECULATE_K
    reuse: bool = False  # whether to use what earlier calls left in the cache, and to leave something to later ones
    in_order: bool = False  # whether rows of passes are in the order of the prompts
    is_drained: bool = False  # whether the caller does nothing until all are answered
    notify: abc.Callable[[], object] | None = None  # as in `Sequence`


class SequenceMaker:
    """Makes the sequences of one engine."""

    def __init__(self, params: ModelArgs, tokenizer: AnyTokenizer, seed: int, draft: DraftProposer | None):
        self.tokenizer = tokenizer
        self._max_seq_len = params.max_seq_len
        self._draft_proposer = draft
        self._grammars = Grammars(tokenizer)
        self.seeds = SequenceSeeds(seed)

    def make_sequences(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        settings: abc.Sequence[Settings],
        scope: int | None,
        options: CallOptions,
    ) -> list[Sequence]:
        """n sequences for each prompt and its settings. Of equal prompts the first has the prompt's logprobs."""
        sequences: list[Sequence] = []
        firsts: dict[tuple[int, ...], Sequence] = {}
        for prompt, own in zip(prompt_tokens, settings, strict=True):
            tokens = [int(token) for token in prompt]
            for copy in range(options.n):
                s = self._make_sequence(len(sequences), list(tokens), own, copy, scope, options)
                first = firsts.setdefault(tuple(tokens), s)
                s.twin = None if first is s or scope is None else first
                sequences.append(s)
        return sequences

    def _make_sequence(
        self, index: int, prompt: list[int], settings: Settings, copy: int, scope: int | None, options: CallOptions
    ) -> Sequence:
        """copy: its number among the sequences of this prompt."""
        room = self._max_seq_len - len(prompt)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=settings,
            stops=self.stop_tokens(settings),
            remaining=room if settings.max_gen_len is None else min(room, settings.max_gen_len),
            decoder=self.tokenizer.stream_decoder(),
            generator=self.seeds.make_generator(prompt, settings.seed, copy),
            stop_finder=StopFinder(settings.stop),
            output=options.output,
            scope=scope,
            matcher=self._make_matcher(settings),
            proposer=self.make_proposer(options.lookup_ngram),
            lookup_ngram=options.lookup_ngram,
            most_proposals=options.speculate_k if options.lookup_ngram or self._draft_proposer else 0,
            in_order=options.in_order,
            is_drained=options.is_drained,
            notify=options.notify,
        )

    def _make_matcher(self, settings: Settings) -> Matcher | None:
        if settings.response_format is None or not settings.is_constrained or not parallel.is_group_leader():
            return None
        matcher = self._grammars.make_matcher(settings.response_format)
        if parallel.group().size() == 1:  # else the sequence fails where its first token is chosen, on all ranks alike
            matcher.check()
        return matcher

    def make_proposer(self, lookup_ngram: int | None) -> Proposer | None:
        return self._draft_proposer if lookup_ngram is None else make_lookup_proposer(lookup_ngram)

    def make_reading(
        self,
        index: int,
        prompt: list[int],
        answer: abc.Sequence[int] = (),
        scope: int | None = None,
        *,
        first: int | None = None,
        consume: Consume | None = None,
        consume_logits: ConsumeLogits | None = None,
        is_drained: bool = True,
    ) -> Sequence:
        """A sequence that is read and gets no further token. scope: one of `open_scopes`; None: it shares nothing.

        first: the first token of the prompt whose logprob is wanted; None: none is. The others: as in `Sequence`.
        """
        wanted = OutputOptions(logprobs=first is not None, echo=first is not None)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=READ_SETTINGS,
            stops=frozenset(),
            remaining=0,
            decoder=self.tokenizer.stream_decoder(),
            generator=torch.Generator(),
            stop_finder=StopFinder(()),
            output=wanted,
            scope=scope,
            first=first or 1,
            is_read=True,
            consume=consume,
            consume_logits=consume_logits,
            is_drained=is_drained,
            answer=list(answer),
        )

    def stop_tokens(self, settings: Settings) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokenizer.stop_tokens) | {*settings.stop_token_ids}
