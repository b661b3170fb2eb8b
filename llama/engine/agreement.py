"""What all ranks are about to do, where all make the same calls: they go on if it is the same, and all raise if not.

Before each call and each step all meet: a few numbers from each, and more only where they differ. Knows ranks; knows no
model and no cache.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .. import parallel
from .._util.agreement import digest
from ..errors import LlamaError

IN_CALL: ContextVar[bool] = ContextVar("whether a call is made that all ranks make", default=False)
STEP = "a step"
Live = frozenset[tuple[int, int]]  # engines and keys of sequences


@dataclass(frozen=True)
class Intention:
    """What a rank is about to do."""

    call: str  # a call's name, or STEP
    arguments: dict[str, str] = field(default_factory=dict)  # digests by name, of a call
    waited: Live = frozenset()  # of a step
    live: Live = frozenset()  # of an engine that makes a call or a step: those that go on
    engine: int = 0
    error: str | None = None  # why the call can't be made

    @property
    def number(self) -> int:
        """Equal for equal intentions."""
        return int(digest((self.call, self.arguments, self.waited))[:15], 16)


def meet(own: Intention) -> list[Intention]:
    """The intentions of all ranks. Raises LlamaError where one has ended."""
    ranks = parallel.group()
    with name_loss(own.call):
        numbers = gather([own.number, own.error is not None])
        if all(number == numbers[0] for number in numbers) and own.error is None:
            return [own] * ranks.size()
        said: list[Any] = [None] * ranks.size()
        dist.all_gather_object(said, own, group=ranks)
    return said


def gather(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of all ranks, as many of each."""
    ranks, own = parallel.group(), torch.tensor(numbers, dtype=torch.long)
    found = [torch.empty_like(own) for _ in range(ranks.size())]
    dist.all_gather(found, own, group=ranks)
    return torch.stack(found).tolist()


@contextlib.contextmanager
def name_loss(what: str) -> Iterator[None]:
    """Raise LlamaError where a rank has ended before `what`, for which all meet."""
    try:
        yield
    except RuntimeError as e:
        raise LlamaError(
            f"rank {dist.get_rank()} has lost another rank, which has ended, before {what}: all ranks make the "
            "same calls in the same order"
        ) from e


def find_difference(said: list[Intention]) -> str | None:
    """Why ranks with these intentions can't go on; None: they can, or some wait for what the first rank has ended."""
    first = said[0]
    for rank, other in enumerate(said):
        if other.call == STEP and first.call == STEP and other.waited == first.waited:
            continue
        if other.call == STEP:
            if other.engine != first.engine or other.waited & first.live:
                what = "others" if first.call == STEP else f"{first.call} is called"
                return f"rank {rank} waits for answers, and on rank 0 {what}"
        elif other.call != first.call:
            what = "answers are waited for" if first.call == STEP else f"{first.call} is called"
            return f"rank {rank} calls {other.call}, and on rank 0 {what}"
        elif differing := [name for name, value in first.arguments.items() if other.arguments.get(name) != value]:
            return f"rank {rank} calls {first.call} with other {differing[0]} than rank 0"
    return None


def raise_shared(message: str, cause: Exception | None = None) -> None:
    """Raise a LlamaError that all ranks raise."""
    shared = LlamaError(message)
    shared.everywhere = True
    raise shared from cause


def check_difference(said: list[Intention]) -> None:
    if (difference := find_difference(said)) is not None:
        raise_shared(f"{difference}: all ranks make the same calls in the same order")


def agree_on_model(forgets: bool, resets: bool, is_fast: bool) -> tuple[bool, bool]:
    """Whether any rank's model was edited, so that all forget what they cached, and whether any rank's slots are empty.

    Raises LlamaError where some ranks run the model's fast form and others don't.
    """
    with name_loss(STEP):
        forget, reset, fast = zip(*gather([forgets, resets, is_fast]), strict=True)
    if len(set(fast)) > 1:
        raise_shared(
            f"the model was hooked or edited on rank {fast.index(0)} and not on all: do the same on every rank"
        )
    return any(forget), any(reset)


def may_step(own: Intention) -> bool:
    """Whether all ranks are about to make this step; False: the first rank has ended what this one waits for."""
    while True:
        said = meet(own)
        check_difference(said)
        if all(other.call == STEP and other.waited == own.waited for other in said):
            return True
        if said[0].call != STEP or own.waited != said[0].waited:
            return False


@contextlib.contextmanager
def call_together(
    call: str, find_live: Callable[[], Live] = frozenset, engine: int = 0, **arguments: object
) -> Iterator[None]:
    """A context for the checks of a call, which fail on all ranks of the model-parallel group alike.

    Raises LlamaError for ranks that make different calls, or wait for an answer meanwhile that the first rank hasn't
    ended. Calls that a call makes in this context are no calls of their own.
    """
    if parallel.group().size() == 1 or IN_CALL.get():
        yield
        return
    token = IN_CALL.set(True)
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    finally:
        IN_CALL.reset(token)
    message = None if error is None else str(error) if isinstance(error, LlamaError) else repr(error)
    digests = {name: digest(value) for name, value in arguments.items()}
    own = Intention(call, digests, live=find_live(), engine=engine, error=message)
    while True:
        said = meet(own)
        if any(other.error for other in said):
            if error is not None and not isinstance(error, LlamaError):
                raise error
            rank, told = next((rank, other.error) for rank, other in enumerate(said) if other.error)
            on_all = all(other.error == told for other in said)
            raise_shared(told if on_all else f"rank {rank}: {told}", error)
        check_difference(said)
        if all(other.call != STEP for other in said):
            return


def check_one_thread(first: int) -> None:
    """Raise LlamaError in another thread than the one that made the first call."""
    if threading.get_ident() != first:
        raise LlamaError(
            "a second thread uses a model on several ranks, where calls of threads come in another order on each: "
            "make all calls from one thread, or let one rank lead"
        )
