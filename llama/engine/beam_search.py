"""Beam search: several unfinished answers to each prompt are continued side by side, and the likeliest are kept.

The answers, their scores and the end of the search are those of transformers 5's `generate(num_beams=...)`. Knows the
model and the slots of its cache; knows no text. A function that changes log-probabilities may be passed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import parallel
from .._util.validate import check_count, check_list, is_number
from ..errors import LlamaError, shorten
from ..kv_cache import reorder_slots
from ..model import Attention, ModelArgs, Transformer
from ..settings import Settings, settings_of_rows
from .forward_pass import compute_logits, compute_states
from .not_finite import not_finite_error
from .prefill import prefill
from .request_checks import check_prompts
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
        conflicts = [name for name, value in others.items() if value]
        if settings.temperature != 0:
            raise LlamaError(
                f"num_beams is {self.num_beams} and temperature {settings.temperature}: beams are the likeliest, and "
                "nothing is drawn; set temperature to 0 or drop num_beams"
            )
        if conflicts or settings.stop:
            raise LlamaError(
                f"num_beams is {self.num_beams} and {[*conflicts, 'stop'][0]} was given: drop one of them"
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
    slot: int  # the cache's slot that holds all but its last token


@dataclass
class _Search:
    """The search for answers to one prompt."""

    index: int  # the prompt's place in the batch
    prompt: list[int]
    room: int  # tokens that an answer may have
    live: list[_Branch] = field(default_factory=list)  # in the order of their slots
    finished: list[Beam] = field(default_factory=list)  # the best first, num_beams at most


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompt_tokens: Sequence[Sequence[int]],
    beams: Beams,
    max_gen_len: int,
    stops: frozenset[int],
    process: Process | None,
    prefill_chunk: int,
) -> list[list[Beam]]:
    """The `num_return_sequences` best answers to each prompt, the best first. Every rank makes the same call.

    max_gen_len: tokens that an answer gets at most, and never more than fit max_seq_len. stops: tokens that end it.
    process: changes the logprobs that are added up; -inf bans a token. It runs on the first rank of the model-parallel
    group only. Where a prompt has no room for an answer, or too much is banned, answers without tokens and with the
    score -1e9 fill the list up.
    Raises LlamaError, before any forward pass, for arguments that can't work; and for logits that aren't finite.
    """
    with parallel.raise_together(parallel.group()):
        check_count("max_gen_len", max_gen_len)
        check_list("prompts", prompt_tokens)
        _check_rows(len(prompt_tokens), beams.num_beams, model.params)
        check_prompts(prompt_tokens, model.params)
    searches = [
        _Search(i, [int(token) for token in prompt], min(max_gen_len, model.params.max_seq_len - len(prompt)))
        for i, prompt in enumerate(prompt_tokens)
    ]
    live = sorted((s for s in searches if s.room > 0), key=lambda search: -len(search.prompt))
    for slot, search in enumerate(live):
        search.live = [_Branch([], 0.0, slot)]
    h = prefill(model, [s.prompt for s in live], prefill_chunk) if live else torch.empty(0)  # (B, dim)
    while live:
        candidates = _choose(model, h, live, beams.num_beams * max(2, 1 + len(stops)), process)
        slots = 0
        for search, branches in zip(live, candidates, strict=True):
            _advance(search, branches, beams, stops)
            search.live = _assign_slots(search.live, slots)
            slots += len(search.live)
        live = [search for search in live if search.live]
        if live:
            h = _decode(model, live)
    missing = [Beam([], NO_SCORE, "length")] * beams.num_return_sequences
    return [(search.finished + missing)[: beams.num_return_sequences] for search in searches]


def _check_rows(prompts: int, num_beams: int, params: ModelArgs) -> None:
    if prompts * num_beams > params.max_batch_size:
        raise LlamaError(
            f"{prompts} prompts x num_beams {num_beams} = {prompts * num_beams} rows, but max_batch_size is "
            f"{params.max_batch_size}: build with a larger max_batch_size, or pass fewer prompts or num_beams"
        )


def _choose(
    model: Transformer, h: Tensor, searches: list[_Search], count: int, process: Process | None
) -> list[list[_Branch]]:
    """The `count` best continuations of each search's branches, the best first.

    h: the states of all live branches (B, dim). The first rank of the model-parallel group chooses for all, in one
    message: sums of logprobs, slots of the branches that are continued, and tokens. Raises LlamaError for NaN.
    """
    logits = compute_logits(model, h)  # (B, vocab_size)
    device, vocab_size = logits.device, logits.shape[-1]
    choices = torch.full((3, len(searches), count), -math.inf, dtype=exact_dtype(device), device=device)
    with nullcontext() if process is None else parallel.raise_together(parallel.group()):  # since `process` may raise
        if parallel.is_group_leader():
            first = 0
            all_totals = _sum_logprobs(logits, searches, process)  # (B, vocab_size)
            for i, totals in enumerate(all_totals.split([len(s.live) for s in searches])):
                best, places = totals.flatten().topk(min(count, totals.numel()))
                choices[0, i, : len(best)] = best
                choices[1, i, : len(best)] = first + places // vocab_size
                choices[2, i, : len(best)] = places % vocab_size
                first += len(totals)
    parents = [branch for search in searches for branch in search.live]  # by slot
    by_search = list(zip(*parallel.broadcast(choices).tolist(), strict=True))
    for search, (totals, _, _) in zip(searches, by_search, strict=True):
        if any(map(math.isnan, totals)):
            position = len(search.prompt) + len(search.live[0].tokens)
            raise not_finite_error(model, f"row {search.index}: the logits at position {position} are")
    return [_make_branches(search, parents, *chosen) for search, chosen in zip(searches, by_search, strict=True)]


def _make_branches(
    search: _Search, parents: list[_Branch], totals: list[float], slots: list[float], tokens: list[float]
) -> list[_Branch]:
    """The branches that `_choose` chose for a search, without banned ones."""
    return [
        _Branch([*parents[int(slot)].tokens, int(token)], total, int(slot))
        for total, slot, token in zip(totals, slots, tokens, strict=True)
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


def _assign_slots(branches: list[_Branch], first: int) -> list[_Branch]:
    """Order branches by the slots that they get, from `first` on, so that as many as possible keep their slot."""
    slots = range(first, first + len(branches))
    staying = {branch.slot: branch for branch in reversed(branches) if branch.slot in slots}
    moving = iter([branch for branch in branches if staying.get(branch.slot) is not branch])
    return [staying[slot] if slot in staying else next(moving) for slot in slots]


def list_caches(model: Transformer) -> list[Tensor]:
    """The caches of calls by hand that were used: (max_batch_size, max_seq_len, KV, D) each."""
    attentions = [cast(Attention, layer.attention) for layer in model.layers]
    return [cache for a in attentions for cache in (a.cache_k, a.cache_v) if cache is not None]


def _decode(model: Transformer, searches: list[_Search]) -> Tensor:
    """Move the live branches' cache to their slots, and run their last tokens: hidden states (B, dim)."""
    live = [branch for search in searches for branch in search.live]
    cached = [len(search.prompt) + len(branch.tokens) - 1 for search in searches for branch in search.live]
    reorder_slots(list_caches(model), torch.tensor([branch.slot for branch in live]), max(cached))
    tokens = copy_to_device(torch.tensor([[branch.tokens[-1]] for branch in live]), model.device)  # (B, 1)
    start_pos = torch.tensor(cached, pin_memory=model.device.type == "cuda")  # (B)
    return compute_states(model, tokens, start_pos)[:, -1]
