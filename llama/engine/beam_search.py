"""Beam search: the likeliest answers that a search over several unfinished ones at once finds.

Which answers, with which scores, and when a search ends is as in transformers 5's `generate(num_beams=...)`. Knows the
model and its cache rows; knows no text. What processes log-probabilities comes in as a function.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import parallel
from .._util.validate import check_count, check_list, is_number
from ..errors import LlamaError
from ..model import ModelArgs, Transformer
from ..settings import Settings
from .request_checks import check_prompts
from .scheduler import prefill
from .transfer import exact_dtype, sent

Process = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]

STEEPEST = 32  # length penalty: a power of any length that is still a float
NO_SCORE = -1e9  # of an answer that there isn't, as transformers has it


@dataclass(frozen=True)
class Beams:
    """How to search: with how many unfinished answers a prompt, and which finished ones are the best.

    length_penalty: scores are sums of logprobs, divided by the answer's length to this power; larger ones favour longer
    answers. early_stopping: with num_beams finished answers, True ends the search, False goes on while one that ended
    now could still be better than the worst of them, "never" while one of any length could. num_return_sequences: how
    many of the finished answers are wanted. Raises LlamaError for values out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check_count("num_beams", self.num_beams)
        check_count("num_return_sequences", self.num_return_sequences)
        if self.num_return_sequences > self.num_beams:
            raise LlamaError(
                f"num_return_sequences is {self.num_return_sequences}, expected a whole number from 1 to num_beams, "
                f"which is {self.num_beams}"
            )
        if not is_number(self.length_penalty) or not -STEEPEST <= self.length_penalty <= STEEPEST:
            raise LlamaError(
                f"length_penalty is {self.length_penalty!r}, expected a number from {-STEEPEST} to {STEEPEST}"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise LlamaError(f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'")

    def check_with(self, settings: Settings, others: Mapping[str, object]) -> None:
        """Refuse what contradicts a search. others: arguments by name, and whether they were given."""
        given = [name for name, value in others.items() if value]
        if settings.temperature != 0:
            raise LlamaError(
                f"num_beams is {self.num_beams} and temperature {settings.temperature}: beams are the likeliest, and "
                "nothing is drawn; set temperature to 0 or drop num_beams"
            )
        if given or settings.stop:
            raise LlamaError(
                f"num_beams is {self.num_beams} and {[*given, 'stop'][0]} was given: drop one of them"
                + "; num_return_sequences says how many beams are wanted" * ("n" in given[:1])
            )

    def check_unused(self) -> None:
        """Refuse settings of a search that is none."""
        for name in ("length_penalty", "early_stopping", "num_return_sequences"):
            if getattr(self, name) != getattr(Beams(1), name):
                raise LlamaError(f"{name} was given without beams: drop it, or set num_beams above 1")

    def score(self, total: float, length: int) -> float:
        """Of an answer of so many tokens, its stop counted, whose logprobs add up to `total`."""
        return total / length**self.length_penalty


@dataclass(frozen=True)
class Beam:
    """A finished answer. tokens: without the stop. stop: the token that ended it; None where its length did."""

    tokens: list[int]
    score: float
    finish_reason: Literal["stop", "length"]
    stop: int | None = None


@dataclass(frozen=True)
class _Branch:
    """An unfinished answer, the sum of its logprobs, and the cache row of what it continues."""

    tokens: list[int]
    total: float
    row: int


@dataclass
class _Search:
    """A prompt's search. room: tokens that an answer may have. live: in the order of their cache rows."""

    index: int
    prompt: list[int]
    room: int
    live: list[_Branch] = field(default_factory=list)
    ended: list[Beam] = field(default_factory=list)  # the best first, num_beams at most


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    beams: Beams,
    max_gen_len: int,
    stops: frozenset[int],
    process: Process | None,
    prefill_chunk: int,
) -> list[list[Beam]]:
    """The `num_return_sequences` best answers to each prompt, the best first. On several ranks all call it alike.

    max_gen_len: tokens that an answer gets at most, and never more than fit max_seq_len. stops: tokens that end it.
    process: from an unfinished answer's logprobs, float32 (vocab_size), its prompt and its tokens so far to what is
    added up in their place; -inf bans a token. Runs on the model-parallel group's first rank only. Where a prompt has
    no room for an answer, or too much is banned, answers without tokens and with the score -1e9 fill up.
    Raises LlamaError, before any forward pass, for what can't work; and for logits that aren't finite.
    """
    with parallel.raise_together(parallel.group()):
        check_count("max_gen_len", max_gen_len)
        check_list("prompts", prompts)
        _check_rows(len(prompts), beams.num_beams, model.params)
        check_prompts(prompts, model.params)
    searches = [
        _Search(i, [int(token) for token in prompt], min(max_gen_len, model.params.max_seq_len - len(prompt)))
        for i, prompt in enumerate(prompts)
    ]
    going = sorted((s for s in searches if s.room > 0), key=lambda search: -len(search.prompt))
    for row, search in enumerate(going):
        search.live = [_Branch([], 0.0, row)]
    h = prefill(model, [s.prompt for s in going], prefill_chunk, False)[0] if going else torch.empty(0)  # (B, dim)
    while going:
        found = _choose(model.logits(h), going, beams.num_beams * max(2, 1 + len(stops)), process)
        rows = 0
        for search, branches in zip(going, found, strict=True):
            _advance(search, branches, beams, stops)
            search.live = _settled(search.live, rows)
            rows += len(search.live)
        going = [search for search in going if search.live]
        if going:
            h = _decode(model, going)
    missing = [Beam([], NO_SCORE, "length")] * beams.num_return_sequences
    return [(search.ended + missing)[: beams.num_return_sequences] for search in searches]


def _check_rows(prompts: int, num_beams: int, params: ModelArgs) -> None:
    if prompts * num_beams > params.max_batch_size:
        raise LlamaError(
            f"{prompts} prompts x num_beams {num_beams} = {prompts * num_beams} rows, but max_batch_size is "
            f"{params.max_batch_size}: build with a larger max_batch_size, or pass fewer prompts or num_beams"
        )


def _choose(logits: Tensor, searches: list[_Search], count: int, process: Process | None) -> list[list[_Branch]]:
    """The `count` best continuations of each search, the best first, chosen on the group's first rank.

    logits: (B, vocab_size), of all live branches.
    """
    device, vocab_size = logits.device, logits.shape[-1]
    shape = 3, len(searches), count
    picked = torch.full(shape, -math.inf, dtype=exact_dtype(device), device=device)  # in one message
    with nullcontext() if process is None else parallel.raise_together(parallel.group()):  # since `process` may raise
        if parallel.is_group_leader():
            first = 0
            for i, totals in enumerate(_totals(logits, searches, process).split([len(s.live) for s in searches])):
                best, places = totals.flatten().topk(min(count, totals.numel()))
                picked[0, i, : len(best)] = best
                picked[1, i, : len(best)] = first + places // vocab_size
                picked[2, i, : len(best)] = places % vocab_size
                first += len(totals)
    parents = [branch for search in searches for branch in search.live]
    found = zip(*parallel.broadcast(picked).tolist(), strict=True)
    return [_continued(search, parents, *each) for search, each in zip(searches, found, strict=True)]


def _continued(
    search: _Search, parents: list[_Branch], totals: list[float], rows: list[float], tokens: list[float]
) -> list[_Branch]:
    """A search's branches as `_choose` found them, but for those that are banned: by cache row, of all parents."""
    if any(math.isnan(total) for total in totals):
        raise LlamaError(
            f"row {search.index}: the logits at position {len(search.prompt) + len(search.live[0].tokens)} are not "
            "finite: the weights are damaged or this dtype overflows; try --dtype float32"
        )
    return [
        _Branch([*parents[int(row)].tokens, int(token)], total, int(row))
        for total, row, token in zip(totals, rows, tokens, strict=True)
        if total > -math.inf
    ]


def _totals(logits: Tensor, searches: list[_Search], process: Process | None) -> Tensor:
    """The sum of logprobs of each live branch with each token after it: (B, vocab_size). NaN: the logits aren't finite.

    What `process` makes of logprobs isn't normalised again.
    """
    live = [(search.prompt, branch) for search in searches for branch in search.live]
    logprobs = torch.log_softmax(logits, dim=-1)
    if process is not None:
        logprobs = torch.stack(
            [process(row, prompt, branch.tokens) for row, (prompt, branch) in zip(logprobs, live, strict=True)]
        )
    before = sent(torch.tensor([branch.total for _, branch in live], dtype=torch.float32), logits.device)  # (B)
    return (logprobs + before[:, None]).masked_fill(~logits.isfinite().all(dim=-1, keepdim=True), math.nan)


def _advance(search: _Search, found: list[_Branch], beams: Beams, stops: frozenset[int]) -> None:
    """Let a search's answers be a token longer. found: the best continuations, the best first.

    A stop below the first num_beams of them ends no answer: it is there only so that enough others are.
    """
    length = len(search.live[0].tokens) + 1
    full = length == search.room
    for branch in found[: beams.num_beams]:
        *tokens, last = branch.tokens
        score = beams.score(branch.total, length)
        if last in stops:
            search.ended.append(Beam(tokens, score, "stop", last))
        elif full:
            search.ended.append(Beam(branch.tokens, score, "length"))
    search.ended = sorted(search.ended, key=lambda beam: -beam.score)[: beams.num_beams]
    going = [branch for branch in found if branch.tokens[-1] not in stops][: beams.num_beams]
    search.live = going if not full and going and _improvable(search, going[0].total, length, beams) else []


def _improvable(search: _Search, total: float, length: int, beams: Beams) -> bool:
    """Whether to go on with branches of this length, the best of which has this sum of logprobs."""
    if len(search.ended) < beams.num_beams:
        return True
    if beams.early_stopping is True or beams.num_beams == 1:  # one beam is greedy, whatever it could still find
        return False
    any_length = beams.early_stopping == "never" and beams.length_penalty > 0
    return beams.score(total, search.room if any_length else length) > search.ended[-1].score


def _settled(branches: list[_Branch], first: int) -> list[_Branch]:
    """In the order of the rows from `first` on that they'll own, of which as many as can stay where they are."""
    rows = range(first, first + len(branches))
    staying = {branch.row: branch for branch in reversed(branches) if branch.row in rows}
    moving = iter([branch for branch in branches if staying.get(branch.row) is not branch])
    return [staying[row] if row in staying else next(moving) for row in rows]


def _decode(model: Transformer, searches: list[_Search]) -> Tensor:
    """Give the live branches their cache rows, and run their last tokens: hidden states (B, dim)."""
    device = model.device
    live = [branch for search in searches for branch in search.live]
    cached = [len(search.prompt) + len(branch.tokens) - 1 for search in searches for branch in search.live]
    model.reorder_cache_rows(torch.tensor([branch.row for branch in live]), max(cached))
    tokens = sent(torch.tensor([[branch.tokens[-1]] for branch in live]), device)  # (B, 1)
    start_pos = torch.tensor(cached, pin_memory=device.type == "cuda")  # (B)
    return model.hidden_states(tokens, start_pos)[:, -1]
