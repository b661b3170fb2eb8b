"""Several tokens in one forward pass: some are proposed, and the model checks all of them at once.

The model chooses every token as it does without proposals, from the same distribution with the same random number. So
the text is the same, sampled or not, and only the number of passes is smaller. Knows sequences and their runner; knows
no text.
"""

from collections import abc
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from .. import parallel
from ..model import Transformer
from .model_runner import ModelRunner, OutputOptions, choose_tokens, describe_choices, share_processor_errors
from .sequence import Sequence, Step, count_common_prefix
from .transfer import exact_dtype

SPECULATE_K = 5  # tokens that are proposed at a time
# From sequences, and the number of tokens that each may get at most, to the tokens proposed for each.
Propose = Callable[[list[Sequence], list[int]], list[list[int]]]


def lookup(tokens: abc.Sequence[int], ngram: int, most: int) -> list[int]:
    """The up to `most` tokens that followed where the last `ngram` tokens occurred before, most recently.

    Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
    """
    tail = list(tokens[-ngram:])
    for start in range(len(tokens) - ngram - 1, -1, -1):
        if tokens[start : start + ngram] == tail:
            return list(tokens[start + ngram : start + ngram + most])
    return []


def make_lookup_proposer(ngram: int) -> Propose:
    """Proposes by `lookup` in each sequence's own tokens."""

    def propose(sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        return [lookup(s.prompt + s.answer, ngram, limit) for s, limit in zip(sequences, limits, strict=True)]

    return propose


@torch.no_grad()
def run_speculative(
    runner: ModelRunner, sequences: list[Sequence], output: OutputOptions, propose: Propose, most: int, cached: int = 0
) -> Iterator[list[Step]]:
    """As `ModelRunner.run`, with 1 to 1 + `most` steps of each sequence after a pass, in their order."""
    ticket, live, h = yield from runner.begin(sequences, output, cached)
    proposals: list[list[int]] = [[] for _ in live]
    h = h[:, None]  # (B, T, dim)
    while live:
        yield verify(runner, runner.model.logits(h), live, proposals, output)
        unfinished = [s for s in live if s.finish_reason is None]
        if not unfinished:
            return
        runner.check_owner(ticket)
        live = runner.compact(live, unfinished)
        room = min(runner.model.params.max_seq_len - s.position for s in live)  # padding needs room too
        proposals = propose(live, [min(most, room, s.remaining - 1) for s in live])
        h = run_proposals(runner.model, live, proposals)


def run_proposals(model: Transformer, sequences: list[Sequence], proposals: list[list[int]]) -> Tensor:
    """One pass over each sequence's last token and its proposals, padded: hidden states (B, T, dim)."""
    longest = max(map(len, proposals))
    tokens = [[s.answer[-1], *p, *[0] * (longest - len(p))] for s, p in zip(sequences, proposals, strict=True)]
    starts = torch.tensor([s.cached for s in sequences])
    lengths = torch.arange(1, 2 + longest, device=model.device).expand(len(sequences), -1)  # (B, T)
    return model.hidden_states(torch.tensor(tokens, device=model.device), starts, lengths)


def verify(
    runner: ModelRunner, logits: Tensor, live: list[Sequence], proposals: list[list[int]], output: OutputOptions
) -> list[Step]:
    """The steps of each sequence, up to and with the first token that differs from its proposal.

    logits: (B, T, vocab_size). Tokens are chosen at all places at once, as if all proposals were right; those after a
    wrong proposal are dropped.
    """
    counts = [1 + len(p) for p in proposals]
    shape = 2 + 2 * output.top, sum(counts)
    choices = torch.zeros(shape, dtype=exact_dtype(logits.device), device=logits.device)
    with share_processor_errors(live):
        if parallel.is_group_leader():
            unpadded = torch.cat([row[:count] for row, count in zip(logits, counts, strict=True)])  # (N, vocab_size)
            repeated = [s for s, count in zip(live, counts, strict=True) for _ in range(count)]
            before = [p[:i] for p in proposals for i in range(1 + len(p))]  # the proposals before each place
            choices[:] = describe_choices(unpadded, choose_tokens(unpadded, repeated, before), output)
    columns = iter(parallel.broadcast(choices).T.tolist())
    steps: list[Step] = []
    for s, proposal, count in zip(live, proposals, counts, strict=True):
        earlier = len(steps)  # those of other sequences
        for choice, proposed in zip(list(islice(columns, count)), [*proposal, None], strict=True):
            steps.append(runner.accept(s, choice, output))
            if s.finish_reason is not None or choice[0] != proposed:
                break
        s.cached = s.position - 1  # what the slot holds beyond that comes from wrong proposals
        runner.proposed += len(proposal)
        runner.accepted += len(steps) - earlier - 1
    return steps


class DraftProposer:
    """Proposes what a smaller model chooses, with each sequence's own random numbers, so that it is often right.

    A sequence's slot in the smaller model's cache is its index. A slot keeps the tokens of earlier streams, and what a
    new text has in common with them isn't computed again.
    """

    def __init__(self, model: Transformer, chunk: int):
        self._model = model
        self._chunk = chunk
        self._cached: list[list[int]] = [[] for _ in range(model.params.max_batch_size)]  # the tokens of each slot

    def __call__(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in sequences]
        for _ in range(max(limits)):
            tokens_so_far = [s.prompt + s.answer + p for s, p in zip(sequences, proposals, strict=True)]
            h = self._feed(sequences, tokens_so_far)
            if h is None:
                break
            logits = self._model.logits(h)  # (B, vocab_size); all ranks take part
            tokens = torch.zeros(len(sequences), dtype=torch.long, device=h.device)
            with share_processor_errors(sequences):
                if parallel.is_group_leader():
                    tokens[:] = choose_tokens(logits, sequences, proposals)
            for proposal, token in zip(proposals, parallel.broadcast(tokens).tolist(), strict=True):
                proposal.append(max(token, 0))
        return [proposal[:limit] for proposal, limit in zip(proposals, limits, strict=True)]

    def _feed(self, sequences: list[Sequence], tokens_so_far: list[list[int]]) -> Tensor | None:
        """Run the tokens that aren't cached yet through the model: hidden states of each sequence's last one (B, dim).

        tokens_so_far: of each sequence. Returns None where padding would not fit the cache; the last few tokens of a
        full context then get no proposals.
        """
        places = {s.index: place for place, s in enumerate(sequences)}
        count = max(places) + 1
        for slot, tokens in enumerate(self._cached[:count]):
            # The slots of sequences that have ended are fed padding from position 0 on, and hold nothing.
            del tokens[count_common_prefix(tokens, tokens_so_far[places[slot]][:-1]) if slot in places else 0 :]
        chunk = max(self._chunk // count, 1)
        last: dict[int, Tensor] = {}
        while len(last) < len(sequences):
            new = {slot: tokens_so_far[place][len(self._cached[slot]) :][:chunk] for slot, place in places.items()}
            longest = max(map(len, new.values()))
            starts = [len(tokens) for tokens in self._cached[:count]]
            if max(starts) + longest > self._model.params.max_seq_len:
                return None
            padded = [new.get(slot, []) + [0] * (longest - len(new.get(slot, []))) for slot in range(count)]
            h = self._model.hidden_states(torch.tensor(padded, device=self._model.device), torch.tensor(starts))
            for slot, tokens in new.items():
                self._cached[slot] += tokens
                if tokens and len(self._cached[slot]) == len(tokens_so_far[places[slot]]):
                    last[slot] = h[slot, len(tokens) - 1]
        return torch.stack([last[s.index] for s in sequences])
