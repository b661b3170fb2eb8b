"""Which requests each step computes, and where in the cache: `Scheduler`.

Commands go in, plans of steps come out. Knows no tensors, no clock and no ranks: the same commands give the same plans.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .cache_book import CacheBook
from .pieces import choose_pieces
from .placement import Job, Placement
from .step_plan import Piece, Row, SlotRelease, StepPlan

WORTH_WAITING = 16  # tokens of a common prefix that another request will have read soon, and that nobody has read yet
MOST_CUTS = 3  # pieces in a row of the first reader that shorter texts may cut short


class Scheduler:
    """Plans steps over the requests that it was told of.

    First come, first admitted. Two exceptions: a request that waits until another has read their common prefix
    keeps its place, and those behind it are admitted into what room is left beside it; the oldest wanted request always
    goes on, and sets back younger ones where it has to.
    """

    def __init__(self, book: CacheBook, max_rows: int, prefill_chunk: int, max_seq_len: int) -> None:
        self.book = book
        self.max_rows = max_rows
        self.prefill_chunk = prefill_chunk
        self.max_seq_len = max_seq_len
        self._jobs: dict[int, Job] = {}
        self._wanted: set[int] = set()
        self._placement = Placement(book)
        self._in_scope: Counter[int] = Counter()  # unfinished requests
        self._closed: set[int] = set()  # scopes that end with their last request

    # --- commands ---------------------------------------------------------------------------------------------------

    def add(
        self,
        key: int,
        tokens: Sequence[int],
        *,
        scope: int | None,
        reads_all: bool = False,
        proposals: int = 0,
        after: int | None = None,
    ) -> None:
        """A request arrives: its key, larger than all before, and its prompt.

        scope: requests of equal scopes share prefixes; None shares nothing. reads_all: every position is computed.
        proposals: most tokens that are proposed in a step. after: a request that has to be read before this one is.
        """
        job = Job(key, list(tokens), scope, reads_all, proposals, key in self._wanted)
        job.after = None if after is None else self._jobs.get(after)
        self._jobs[key] = job
        if scope is not None:
            self._in_scope[scope] += 1
        if job.wanted:
            self._placement.wait(job)

    def read_all(self, key: int) -> None:
        """Every position of a request that waits is to be computed."""
        self._jobs[key].reads_all = True

    def want(self, keys: Iterable[int]) -> None:
        """Compute these requests from now on, and no others. The others keep their slots while there is room."""
        wanted = set(keys)
        for key in wanted ^ self._wanted:
            if job := self._jobs.get(key):
                job.wanted = key in wanted
                if job.slot < 0:
                    (self._placement.wait if job.wanted else self._placement.stop_waiting)(job)
        self._wanted = wanted

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """A request's text grows by the tokens that were chosen after a step."""
        job = self._jobs[key]
        job.tokens += tokens
        job.cached = len(job.tokens) - 1  # what was computed of other proposals is void
        self.book.resize(job.slot, job.cached)

    def finish(self, key: int) -> None:
        """A request is done, cancelled or failed. Its slot stays as a cached prefix, unless its scope is None."""
        job = self._jobs.pop(key)
        self._wanted.discard(key)
        if job.slot >= 0:
            self._placement.leave(job, stays=True)
        elif job.wanted:
            self._placement.stop_waiting(job)
        if job.scope is not None:
            self._in_scope[job.scope] -= 1
            self._end_scope(job.scope)

    def close_scope(self, scope: int) -> None:
        """No more requests come in this scope: when its last one is finished, what it left in the cache is released."""
        self._closed.add(scope)
        self._end_scope(scope)

    def forget(self) -> None:
        """The weights changed: nothing that was computed before is used for a request that is admitted later."""
        self._placement.forget()

    def take_releases(self) -> tuple[SlotRelease, ...]:
        """What finished requests have left to be released since the last plan, for when no plan comes soon."""
        releases, self._placement.draft.releases = self._placement.draft.releases, []
        return tuple(releases)

    def reset(self, texts: Mapping[int, Sequence[int]]) -> None:
        """A step failed, so that nobody knows what the slots hold. All requests are computed again from these texts."""
        self._placement.reset()
        for key, tokens in texts.items():
            self._jobs[key].tokens = list(tokens)

    def hit(self, key: int) -> int:
        """Positions that the last admission of this request took from a cached prefix."""
        return self._jobs[key].hit

    def set_by_hand(self, tokens: int) -> None:
        """Positions that calls by hand have taken out of the budget. The next plan makes room for them."""
        self.book.by_hand = tokens

    @property
    def has_work(self) -> bool:
        """Whether a wanted request isn't finished."""
        return any(key in self._jobs for key in self._wanted)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._placement.admitted)

    @property
    def waiting(self) -> int:
        """Requests that have none."""
        return len(self._jobs) - self.running

    def _end_scope(self, scope: int) -> None:
        if not self._in_scope[scope]:
            del self._in_scope[scope]
            if scope in self._closed:
                self._closed.remove(scope)
                self._placement.note_releases(self.book.release_scope(scope))

    # --- one step ---------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step. The book is as it will be after it."""
        self._make_way()
        if self._placement.queue:
            self._admit_waiting()
        wanted = [job for job in self._placement.admitted if job.wanted]
        readers = [job for job in wanted[: self.max_rows] if job.reading]
        decoding = [job for job in wanted if not job.reading]
        pieces = self._read(readers) if readers else ()
        decoding = decoding[: self.max_rows - len(pieces)]
        counts = [1 + (self._propose(job) if job.proposals else 0) for job in decoding]
        rows = [Row(job.key, job.slot, len(job.tokens) - 1, n) for job, n in zip(decoding, counts, strict=True)]
        draft = self._placement.take_draft()
        return StepPlan(tuple(draft.releases), tuple(draft.copies), pieces, tuple(rows), tuple(draft.set_back))

    def _make_way(self) -> None:
        """Make room for the next position of each decoding request, and for what calls by hand have taken."""
        book = self.book
        rows = [job for job in self._placement.admitted if job.wanted and not job.reading]
        while book.room < sum([len(job.tokens) - book.sizes[job.slot] for job in rows]):
            if not self._placement.drop_one(None, all_may_go=True):
                return
            rows = [job for job in rows if job.slot >= 0]
        for job in rows:
            book.resize(job.slot, len(job.tokens))

    def _admit_waiting(self) -> None:
        """Give slots to waiting requests in order of key, as far as there are rows, slots and room."""
        placement = self._placement
        queue, draft = placement.queue, placement.draft
        running = [job for job in placement.admitted if job.wanted]
        rows = self.max_rows - len(running)
        is_oldest = not running or queue[0].key < running[0].key
        while draft.reserved_slots < len(queue) and (rows > 0 or is_oldest):
            job = queue[draft.reserved_slots]
            need = len(job.tokens) + (not is_oldest)  # the oldest has what there is: it needs no more than its text
            if not placement.can_have(need, 1, None, is_oldest):
                return
            if not is_oldest and self._awaits_prefix(job):
                draft.reserved_slots += 1
                draft.reserved_tokens += need
            elif placement.admit(job, need, is_oldest):
                placement.stop_waiting(job)
            else:
                return
            rows -= 1
            is_oldest = False

    def _awaits_prefix(self, job: Job) -> bool:
        """Whether another request is about to read much more of a common prefix than any has read.

        Whoever waits for another does so until that one has read nearly all of it, or doesn't go on.
        """
        if job.after is not None:
            if job.after.reading and job.after.key in self._jobs:
                return True
            job.after = None
        if not self._still_reads(job.awaits, job.common):
            match = self._placement.find_coming(job)
            reader = next((self._jobs[key] for key in match.holders() if self._jobs[key].wanted), None)
            is_news = reader and match.length >= self._placement.find_hit(job).length + WORTH_WAITING
            job.awaits, job.common = (reader, match.length) if is_news else (None, 0)
        return job.awaits is not None

    def _still_reads(self, job: Job | None, common: int) -> bool:
        """Whether a request is reading a prefix of this length, isn't near its end, and others may use it."""
        if job is None or job.slot < 0 or not (job.reading and job.wanted and self.book.is_shared(job.slot)):
            return False
        return job.cached + WORTH_WAITING <= common

    def _read(self, readers: list[Job]) -> tuple[Piece, ...]:
        """Read the next pieces of texts."""
        lengths = [len(job.tokens) - job.cached for job in readers]
        first = readers[0]
        count, width = choose_pieces(lengths[:1] if first.cuts == MOST_CUTS else lengths, self.prefill_chunk)
        first.cuts = first.cuts + 1 if width < min(lengths[0], self.prefill_chunk) else 0
        # The padding of no row reaches beyond the cache.
        width = min(width, self.max_seq_len - max(job.cached for job in readers[:count]))
        pieces = []
        for job in readers[:count]:
            start, job.cached = job.cached, min(job.cached + width, len(job.tokens))
            is_last = job.cached == len(job.tokens)
            pieces.append(Piece(job.key, job.slot, start, job.cached, is_last))
            self.book.record(job.slot, job.cached)
            if is_last:
                self._placement.end_reading(job)
        return tuple(pieces)

    def _propose(self, job: Job) -> int:
        """How many tokens a row may propose. Cached prefixes make room for them."""
        count = min(job.proposals, self.max_seq_len - len(job.tokens))
        if count <= 0:
            return 0
        while self.book.room < count and self._placement.drop_prefix(None):
            pass
        count = max(min(count, self.book.room), 0)
        self.book.resize(job.slot, len(job.tokens) + count)
        return count
