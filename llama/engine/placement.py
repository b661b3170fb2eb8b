"""Which requests have a slot and which wait for one; what makes room, and what a slot begins with.

It carries out what `Scheduler` decides: it gives requests slots, with a prefix that is cached where there is one, drops
cached prefixes and sets requests back where room is needed, and notes all that in the draft of the next plan.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from .cache_book import CacheBook
from .prefix_index import Match, PrefixIndex
from .step_plan import SlotCopy, SlotRelease

LEAST_HIT = 4  # a shorter prefix, such as a begin-of-text alone, isn't worth a copy
WORTH_A_COPY = 32  # a cached prefix of which a request would lose fewer tokens is taken over, not copied
by_key = attrgetter("key")


@dataclass(eq=False, slots=True)
class Job:
    """A request, as the scheduler sees it."""

    key: int
    tokens: list[int]  # prompt and answer so far
    scope: int | None
    reads_all: bool
    proposals: int
    wanted: bool
    slot: int = -1  # -1: it waits for one
    cached: int = 0  # positions of the text that are computed before the next plan's passes
    reading: bool = True  # its text goes into the cache in pieces; at last it is decoded
    hit: int = 0  # positions that its last admission took from a cached prefix
    cuts: int = 0  # pieces in a row that were cut short for the sake of others
    awaits: "Job | None" = None  # a request that is reading a prefix which both begin with
    common: int = 0  # the length of that prefix
    after: "Job | None" = None  # a request that has to be read first


@dataclass
class Draft:
    """The next plan, as far as it is known."""

    releases: list[SlotRelease] = field(default_factory=list)
    copies: list[SlotCopy] = field(default_factory=list)
    set_back: list[int] = field(default_factory=list)
    admitted: list[Job] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)  # slots that are copied from, which comes after all releases
    reserved_tokens: int = 0  # for requests that keep their place in the queue
    reserved_slots: int = 0


class Placement:
    """Requests that wait, and those that have a slot."""

    def __init__(self, book: CacheBook) -> None:
        self.book = book
        self.queue: list[Job] = []  # wanted and waiting, in order of key
        self.admitted: list[Job] = []  # those with a slot, in order of key
        self.draft = Draft()
        self._owners: dict[int, Job] = {}  # by slot
        self._coming: dict[int, PrefixIndex] = {}  # by scope: the texts that are being read, by key

    # --- in and out -------------------------------------------------------------------------------------------------

    def wait(self, job: Job) -> None:
        insort(self.queue, job, key=by_key)

    def stop_waiting(self, job: Job) -> None:
        del self.queue[bisect_left(self.queue, job.key, key=by_key)]

    def leave(self, job: Job, stays: bool) -> None:
        """A request gives up its slot. stays: what it computed may stay as a cached prefix."""
        self.end_reading(job)
        del self.admitted[bisect_left(self.admitted, job.key, key=by_key)]
        del self._owners[job.slot]
        if stays and job.cached and self.book.is_shared(job.slot):
            self.book.retire(job.slot, job.cached)
        else:
            self._release(job.slot)
        job.slot, job.cached, job.reading = -1, 0, True

    def end_reading(self, job: Job) -> None:
        """No request need wait any more until this one has read its text."""
        job.reading = False
        if job.scope in self._coming:
            self._coming[job.scope].remove(job.key)
            if not self._coming[job.scope]:
                del self._coming[job.scope]

    def forget(self) -> None:
        """What is computed or being read now is never used for another request."""
        self.note_releases(self.book.forget())
        self._coming.clear()

    def reset(self) -> None:
        """No slot holds anything: those that had one wait again."""
        self.draft = Draft()
        for job in list(self.admitted):
            self.leave(job, stays=False)
            if job.wanted:
                self.wait(job)
        self.forget()

    def note_releases(self, slots: Iterable[int]) -> None:
        self.draft.releases += [SlotRelease(slot, 0) for slot in slots]

    def take_draft(self) -> Draft:
        """What is to be done before the passes of the plan that ends here."""
        draft, self.draft = self.draft, Draft()
        for job in draft.admitted:  # only now: no copy reads what another copy of the same plan wrote
            self.book.record(job.slot, job.cached)
        return draft

    # --- prefixes ---------------------------------------------------------------------------------------------------

    def find_hit(self, job: Job) -> Match:
        """The longest prefix that a slot of its scope holds. The last token is always computed."""
        if job.scope is None or job.reads_all:
            return Match()
        while True:
            match = self.book.find(job.scope, job.tokens, len(job.tokens) - 1)
            owners = [self._owners[slot] for slot in match.exact_holders() if slot in self._owners]
            behind = [owner for owner in owners if owner.cached > match.length]
            if not behind:
                return match
            for owner in behind:  # the book learns of an answer's tokens when somebody may share them
                self.book.record(owner.slot, owner.cached)

    def find_coming(self, job: Job) -> Match:
        """The longest prefix that is a request's of its scope that is being read. Holders are keys."""
        if job.scope not in self._coming or job.reads_all:
            return Match()
        return self._coming[job.scope].find(job.tokens, len(job.tokens) - 1)

    # --- room -------------------------------------------------------------------------------------------------------

    def can_have(self, tokens: int, slots: int, keep: int | None, all_may_go: bool) -> bool:
        """Whether `make_room` can make so much room, beside what is reserved."""
        book, draft = self.book, self.draft
        kept = {*draft.sources, keep}
        kept_idle = [slot for slot in kept if slot is not None and book.is_idle(slot)]
        room = book.room + book.idle_held - sum(book.sizes[slot] for slot in kept_idle)
        free = book.free + book.idle - len(kept_idle)
        tokens, slots = tokens + draft.reserved_tokens, slots + draft.reserved_slots
        if room >= tokens and free >= slots:
            return True
        victims = self._list_victims(kept, all_may_go)
        return room + sum(book.sizes[job.slot] for job in victims) >= tokens and free + len(victims) >= slots

    def make_room(self, tokens: int, slots: int, keep: int | None, all_may_go: bool) -> bool:
        """Make room for tokens and slots, if that can be done: as `drop_one` does."""
        if not self.can_have(tokens, slots, keep, all_may_go):
            return False
        while self.book.room < tokens or self.book.free < slots:
            self.drop_one(keep, all_may_go)
        return True

    def drop_one(self, keep: int | None, all_may_go: bool) -> bool:
        """Drop the cached prefix that was used least recently; where there is none, set the youngest request back.

        Those that nobody wants now are set back before others; others only if all_may_go. keep: a slot that stays.
        """
        if self.drop_prefix(keep):
            return True
        if not (victims := self._list_victims({*self.draft.sources, keep}, all_may_go)):
            return False
        victim = max(victims, key=lambda job: (not job.wanted, job.key))
        self.draft.set_back.append(victim.key)
        self.leave(victim, stays=False)
        if victim.wanted:
            self.wait(victim)
        return True

    def drop_prefix(self, keep: int | None) -> bool:
        """Drop the cached prefix that was used least recently, if there is one."""
        slot = self.book.find_least_recent({*self.draft.sources, keep})
        if slot is None:
            return False
        self._release(slot)
        return True

    def _list_victims(self, kept: Collection[int | None], all_may_go: bool) -> list[Job]:
        return [job for job in self.admitted if (all_may_go or not job.wanted) and job.slot not in kept]

    def _release(self, slot: int) -> None:
        self.book.release(slot)
        self.note_releases([slot])

    # --- slots ------------------------------------------------------------------------------------------------------

    def admit(self, job: Job, need: int, all_may_go: bool) -> bool:
        """Give a request a slot, with what it can use of a cached prefix, if there is room for `need` tokens."""
        match = self.find_hit(job)
        length = match.length
        is_worth = length >= LEAST_HIT
        near = self._find_idle(match, length + WORTH_A_COPY - 1 if is_worth else length)
        if near is not None and self._take_over(job, near, length, need, all_may_go):
            return True
        if is_worth:
            idle = self._find_idle(match, None)
            source = next(match.holders()) if idle is None else idle
            if self.make_room(need, 1, source, all_may_go):
                self._copy(job, source, length)
                return True
            if idle is not None and self._take_over(job, idle, length, need, all_may_go):
                return True
        if self.make_room(need, 1, None, all_may_go):
            self._enter(job, self.book.take(job.tokens, len(job.tokens), job.scope), 0)
            return True
        return False

    def _find_idle(self, match: Match, furthest: int | None) -> int | None:
        """An idle slot that holds a match. furthest: it holds no more than that."""
        return next((slot for slot in match.holders(furthest) if self.book.is_idle(slot)), None)

    def _take_over(self, job: Job, slot: int, length: int, need: int, all_may_go: bool) -> bool:
        """Give a request an idle slot, of which it keeps the first `length` positions.

        No copy of the same plan reads more of it: it is copied from only where it holds at least WORTH_A_COPY more,
        then `admit` cuts it only behind that, since for another copy there is room as well.
        """
        size = self.book.sizes[slot]
        if not self.make_room(need - size, 0, slot, all_may_go):
            return False
        if size > length:
            self.draft.releases.append(SlotRelease(slot, length))
        self.book.adopt(slot, job.tokens, length, len(job.tokens))
        self._enter(job, slot, length)
        return True

    def _copy(self, job: Job, source: int, length: int) -> None:
        """Give a request a free slot, into which the first `length` positions of another go."""
        slot = self.book.take(job.tokens, len(job.tokens), job.scope)
        self.draft.copies.append(SlotCopy(source, slot, length))
        self.draft.sources.add(source)
        if self.book.is_idle(source):
            self.book.touch(source)
        self._enter(job, slot, length)

    def _enter(self, job: Job, slot: int, hit: int) -> None:
        job.slot, job.cached, job.hit, job.cuts, job.awaits = slot, hit, hit, 0, None
        self._owners[slot] = job
        insort(self.admitted, job, key=by_key)
        self.draft.admitted.append(job)
        if job.scope is not None:
            self._coming.setdefault(job.scope, PrefixIndex()).insert(job.key, job.tokens, len(job.tokens))
