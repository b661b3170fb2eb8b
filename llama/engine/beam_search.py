"""Beam search: several unfinished answers to each prompt are continued side by side, and the likeliest are kept.

The answers, their scores and the end of the search are those of transformers 5's `generate(num_beams=...)`. For each
token, every unfinished answer is a text that the engine reads; what it goes on from is in the KV cache. Knows the
engine; knows no slot. A function that changes log-probabilities may be passed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import parallel
from .._util.validate import check_count, check_list, is_number
from ..errors import LlamaError, shorten
from ..sampling import Context, apply_logits_processors
from ..settings import Settings, settings_of_rows
from ..tokenization.texts import decode_after
from .ending import Ending
from .engine import Engine
from .not_finite import not_finite_error
from .outputs import Completion
from .request_checks import check_budget, check_prompts, check_token_ids
from .transfer import copy_to_device, exact_dtype

# From an unfinished answer's logprobs, float32 (vocab_size), its prompt and its tokens so far, to the logprobs to use.
Process = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]

STEEPEST = 32  # largest length penalty: any length to this power is still a float
NO_SCORE = -1e9  # score of a missing answer, as in transformers


@dataclass(frozen=True)
class Beams:
    """The settings of a search. Raises LlamaError for values out of range."""

    num_beams: int  # unfinished answers to each prompt
    # The score of an answer is its sum of logprobs, divided by its length to this power; a larger one favours long
    # answers.
    length_penalty: float = 1.0
    # When to end, once there are num_beams finished answers. True: at once. False: when no answer that ended now could
    # be better than the worst of them. "never": when no answer of any length could.
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1  # finished answers to return

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
                f"length_penalty is {shorten(self.length_penalty)}, expected a number from {-STEEPEST} to {STEEPEST}"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise LlamaError(f"early_stopping is {shorten(self.early_stopping)}, expected True, False or 'never'")

    def check(self, shared: Mapping[str, Any], others: Mapping[str, object]) -> Settings | None:
        """The settings of a search; None: there is none. shared: settings of all rows. others: as in `check_with`."""
        if self.num_beams == 1:
            self.check_unused()
            return None
        (settings,) = settings_of_rows(1, shared, None)
        self.check_with(settings, others)
        return settings

    def check_with(self, settings: Settings, others: Mapping[str, object]) -> None:
        """Refuse what contradicts a search. others: arguments of the call by name; true where they were given."""
        constrained = {"stop": settings.stop, "response_format": settings.is_constrained}
        conflicts = [name for name, value in (*others.items(), *constrained.items()) if value]
        if settings.temperature != 0:
            raise LlamaError(
                f"num_beams is {self.num_beams} and temperature {settings.temperature}: beams are the likeliest, and "
                "nothing is drawn; set temperature to 0 or drop num_beams"
            )
        if conflicts:
            raise LlamaError(
                f"num_beams is {self.num_beams} and {conflicts[0]} was given: drop one of them"
                + "; num_return_sequences says how many beams are wanted" * ("n" in conflicts[:1])
            )

    def check_unused(self) -> None:
        """Refuse settings of a search where there is none."""
        for name in ("length_penalty", "early_stopping", "num_return_sequences"):
            if getattr(self, name) != getattr(Beams(1), name):
                raise LlamaError(f"{name} was given without beams: drop it, or set num_beams above 1")

    def score(self, total: float, length: int) -> float:
        """The score of an answer of `length` tokens, its stop included, whose logprobs add up to `total`."""
        return total / length**self.length_penalty


@dataclass(frozen=True)
class Beam:
    """A finished answer."""

    tokens: list[int]  # without the stop
    score: float
    finish_reason: Literal["stop", "length"]
    stop: int | None = None  # the token that ended it; None where its length did


@dataclass(frozen=True)
class _Branch:
    """An unfinished answer."""

    tokens: list[int]
    total: float  # the sum of its tokens' logprobs


@dataclass
class _Search:
    """The search for answers to one prompt."""

    index: int  # the prompt's place in the batch
    prompt: list[int]
    room: int  # tokens that an answer may have
    scope: int  # what its texts share in the KV cache
    live: list[_Branch] = field(default_factory=lambda: [_Branch([], 0.0)])  # the best first
    finished: list[Beam] = field(default_factory=list)  # the best first, num_beams at most


def search_beams(
    engine: Engine,
    prompt_tokens: Sequence[Sequence[int]],
    beams: Beams,
    settings: Settings,
    ending: Ending | None = None,
) -> list[Completion]:
    """The best answers to the first prompt, then to the second ... Raises LlamaError."""
    with engine.together("beams", prompts=prompt_tokens, settings=(beams, settings)):
        check_token_ids([settings], 0, engine.model.params.vocab_size)
    stops = engine.maker.stop_tokens(settings)

    def process(logprobs: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        return apply_logits_processors(logprobs, settings, Context(prompt, answer, stops))

    max_gen_len = settings.max_gen_len or engine.model.params.max_seq_len
    used = process if settings.changes_logits else None
    best = beam_search(engine, prompt_tokens, beams, max_gen_len, stops, used, ending)
    decode = partial(decode_after, engine.tokenizer)
    return [
        Completion(list(prompt), b.tokens, decode(prompt, b.tokens), b.finish_reason, b.stop, score=b.score)
        for prompt, prompt_beams in zip(prompt_tokens, best, strict=True)
        for b in prompt_beams
    ]


@torch.no_grad()
def beam_search(
    engine: Engine,
    prompt_tokens: Sequence[Sequence[int]],
    beams: Beams,
    max_gen_len: int,
    stops: frozenset[int],
    process: Process | None = None,
    ending: Ending | None = None,
) -> list[list[Beam]]:
    """The `num_return_sequences` best answers to each prompt, the best first. Every rank makes the same call.

    max_gen_len: tokens that an answer gets at most, and never more than fit max_seq_len. stops: tokens that end it.
    process: changes the logprobs that are added up; -inf bans a token. It runs on the first rank of the model-parallel
    group only. Where a prompt has no room for an answer, or too much is banned, answers without tokens and with the
    score -1e9 fill the list up.
    Raises LlamaError, before any forward pass, for arguments that can't work; and for logits that aren't finite.
    """
    params = engine.model.params
    with engine.together("beam_search", prompts=prompt_tokens, settings=(beams, max_gen_len, stops)):
        check_count("max_gen_len", max_gen_len)
        check_list("prompts", prompt_tokens)
        check_prompts(prompt_tokens, params)
        settings = [Settings(max_gen_len=max_gen_len)] * len(prompt_tokens)
        check_budget(prompt_tokens, settings, params.max_seq_len, engine.cache_tokens)
    scopes = engine.open_scopes(len(prompt_tokens))
    searches = [
        _Search(i, [int(token) for token in prompt], min(max_gen_len, params.max_seq_len - len(prompt)), scope)
        for i, (prompt, scope) in enumerate(zip(prompt_tokens, scopes, strict=True))
    ]
    try:
        live = [search for search in searches if search.room > 0]
        while live:
            logits = _read(engine, live, ending or Ending(), calls_back=process is not None)
            candidates = _choose(engine, logits, live, beams.num_beams * max(2, 1 + len(stops)), process)
            for search, branches in zip(live, candidates, strict=True):
                _advance(search, branches, beams, stops)
            live = [search for search in live if search.live]
    finally:
        engine.close_scopes(scopes)
    missing = [Beam([], NO_SCORE, "length")] * beams.num_return_sequences
    return [(search.finished + missing)[: beams.num_return_sequences] for search in searches]


def _read(engine: Engine, searches: list[_Search], ending: Ending, calls_back: bool) -> Tensor:
    """The logits after each live branch of each search: float32 (B, vocab_size).

    calls_back: whether a caller's function, which may edit the model, is called between two passes.
    """
    branches = [(search, branch) for search in searches for branch in search.live]
    logits: list[Tensor] = [torch.empty(0)] * len(branches)
    texts = [
        engine.maker.make_reading(
            *(search.index, search.prompt, branch.tokens, search.scope),
            consume_logits=partial(logits.__setitem__, place),
            is_drained=not calls_back,
        )
        for place, (search, branch) in enumerate(branches)
    ]
    ending.check(texts)
    for _ in engine.read(texts):
        pass
    ending.check(())
    return torch.stack(logits)


def _choose(
    engine: Engine, logits: Tensor, searches: list[_Search], count: int, process: Process | None
) -> list[list[_Branch]]:
    """The `count` best continuations of each search's branches, the best first.

    logits: after all live branches (B, vocab_size). The first rank of the model-parallel group chooses for all, in one
    message: sums of logprobs, places of the branches that are continued, and tokens. Raises LlamaError for NaN.
    """
    device, vocab_size = logits.device, logits.shape[-1]
    choices = torch.full((3, len(searches), count), -math.inf, dtype=exact_dtype(device), device=device)
    with nullcontext() if process is None else engine.together("process"):  # since `process` may raise
        if parallel.is_group_leader():
            all_totals = _sum_logprobs(logits, searches, process)  # (B, vocab_size)
            for i, totals in enumerate(all_totals.split([len(s.live) for s in searches])):
                best, places = totals.flatten().topk(min(count, totals.numel()))
                choices[0, i, : len(best)] = best
                choices[1, i, : len(best)] = places // vocab_size
                choices[2, i, : len(best)] = places % vocab_size
    choices = choices if engine.is_leading else parallel.broadcast(choices)
    by_search = list(zip(*choices.tolist(), strict=True))
    for search, (totals, _, _) in zip(searches, by_search, strict=True):
        if any(map(math.isnan, totals)):
            position = len(search.prompt) + len(search.live[0].tokens)
            raise not_finite_error(
                engine.model, engine.together, f"row {search.index}: the logits at position {position} are"
            )
    return [_make_branches(search, *chosen) for search, chosen in zip(searches, by_search, strict=True)]


def _make_branches(search: _Search, totals: list[float], parents: list[float], tokens: list[float]) -> list[_Branch]:
    """The branches that `_choose` chose for a search, without banned ones."""
    return [
        _Branch([*search.live[int(parent)].tokens, int(token)], total)
        for total, parent, token in zip(totals, parents, tokens, strict=True)
        if total > -math.inf
    ]


def _sum_logprobs(logits: Tensor, searches: list[_Search], process: Process | None) -> Tensor:
    """The sum of logprobs of each live branch with each token after it: (B, vocab_size). NaN: the logits aren't finite.

    The logprobs that `process` returns aren't normalised again.
    """
    live = [(search.prompt, branch) for search in searches for branch in search.live]
    logprobs = torch.log_softmax(logits, dim=-1)
    if process is not None:
        logprobs = torch.stack(
            [process(own_logprobs, prompt, b.tokens) for own_logprobs, (prompt, b) in zip(logprobs, live, strict=True)]
        )
    before = copy_to_device(
        torch.tensor([branch.total for _, branch in live], dtype=torch.float32), logits.device
    )  # (B)
    return (logprobs + before[:, None]).masked_fill(~logits.isfinite().all(dim=-1, keepdim=True), math.nan)


def _advance(search: _Search, candidates: list[_Branch], beams: Beams, stops: frozenset[int]) -> None:
    """Finish the answers that end with this token, and go on with the others. candidates: the best first.

    A stop that isn't among the first num_beams candidates finishes no answer. There are more candidates than num_beams
    only so that enough of them aren't stops.
    """
    length = len(search.live[0].tokens) + 1
    full = length == search.room
    for branch in candidates[: beams.num_beams]:
        *tokens, last = branch.tokens
        score = beams.score(branch.total, length)
        if last in stops:
            search.finished.append(Beam(tokens, score, "stop", last))
        elif full:
            search.finished.append(Beam(branch.tokens, score, "length"))
    search.finished = sorted(search.finished, key=lambda beam: -beam.score)[: beams.num_beams]
    unfinished = [branch for branch in candidates if branch.tokens[-1] not in stops][: beams.num_beams]
    goes_on = not full and unfinished and _can_improve(search, unfinished[0].total, length, beams)
    search.live = unfinished if goes_on else []


def _can_improve(search: _Search, total: float, length: int, beams: Beams) -> bool:
    """Whether to go on with branches of this length, the best of which has this sum of logprobs."""
    if len(search.finished) < beams.num_beams:
        return True
    if beams.early_stopping is True or beams.num_beams == 1:  # one beam is greedy search, which ends with its answer
        return False
    any_length = beams.early_stopping == "never" and beams.length_penalty > 0
    return beams.score(total, search.room if any_length else length) > search.finished[-1].score
