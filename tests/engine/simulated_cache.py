"""A reference model of the engine: it carries out a scheduler's plans on lists of tokens, and checks each of them.

What a slot holds is a list of tokens, with the weights and the scope that they were computed under.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama.engine.cache_book import CacheBook
from llama.engine.scheduler import WORTH_WAITING, Scheduler
from llama.engine.step_plan import Piece, Row, SlotCopy, StepPlan

WRONG = -1  # a token that was proposed and not chosen


def choose_token(text: Sequence[int]) -> int:
    """What the model answers to a text."""
    return (31 * len(text) + 7 * text[-1] + text[0]) % 50


def count_alike(a: Sequence[int], b: Sequence[int]) -> int:
    shorter = min(len(a), len(b))
    return shorter if a[:shorter] == b[:shorter] else next(i for i in range(shorter) if a[i] != b[i])


@dataclass
class Content:
    """What a slot holds."""

    tokens: list[int] = field(default_factory=list)
    weights: int = 0  # the oldest that had a part in it
    mark: object = None  # who may read it


@dataclass
class Request:
    key: int
    tokens: list[int]
    most: int  # tokens that it may have
    scope: int | None
    reads_all: bool
    proposals: int
    slot: int | None = None  # known from its first piece on
    cached: int = 0
    reading: bool = True

    @property
    def mark(self) -> object:
        return ("own", self.key) if self.scope is None else self.scope

    def count_alike(self, tokens: Sequence[int]) -> int:
        """How much of a text it may use."""
        return 0 if self.reads_all else count_alike(self.tokens[:-1], tokens)


class SimulatedCache:
    """A scheduler, and the cache that its plans are carried out on."""

    def __init__(self, n_slots: int, budget: int, max_rows: int, chunk: int, max_seq_len: int = 10**6) -> None:
        self.max_rows, self.chunk, self.max_seq_len = max_rows, chunk, max_seq_len
        self.book = CacheBook(n_slots, budget)
        self.scheduler = Scheduler(self.book, max_rows, chunk, max_seq_len)
        self.slots = [Content() for _ in range(n_slots)]
        self.requests: dict[int, Request] = {}  # unfinished ones
        self.wanted: set[int] = set()
        self.answers: dict[int, list[int]] = {}  # the whole texts of finished requests
        self.weights = 0
        self.computed = 0  # positions of pieces and rows
        self.first_steps: dict[int, int] = {}  # when each request was computed first
        self.steps = 0

    # --- commands ---------------------------------------------------------------------------------------------------

    def add(
        self,
        key: int,
        tokens: Sequence[int],
        answer: int = 1,
        scope: int | None = 0,
        reads_all: bool = False,
        proposals: int = 0,
    ) -> None:
        """A wanted request: its prompt, and the length of its answer."""
        self.requests[key] = Request(key, list(tokens), len(tokens) + answer, scope, reads_all, proposals)
        self.scheduler.add(key, tokens, scope=scope, reads_all=reads_all, proposals=proposals)
        self.want(self.wanted | {key})

    def want(self, keys: set[int]) -> None:
        self.wanted = set(keys)
        self.scheduler.want(keys)

    def finish(self, key: int) -> None:
        request = self.requests.pop(key)
        self.answers[key] = request.tokens
        self.wanted.discard(key)
        if request.slot is not None:
            del self.slots[request.slot].tokens[request.cached :]
        self.scheduler.finish(key)

    def forget(self) -> None:
        self.weights += 1
        self.scheduler.forget()

    def run(self, most_steps: int = 10**6) -> None:
        """Steps until no wanted request is left."""
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.wanted and not self.scheduler.has_work

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self, is_answered: bool = True) -> StepPlan:
        """Plan a step, check it, carry it out, and choose the tokens that follow, unless the step is interrupted."""
        self.steps += 1
        decoding = {request.key for request in self.requests.values() if not request.reading}
        begun = {job.key for job in self.scheduler._placement.admitted}  # some without a piece so far
        plan = self.scheduler.plan()
        for key in plan.set_back:
            self.requests[key].slot, self.requests[key].cached, self.requests[key].reading = None, 0, True
        for release in plan.releases:
            del self.slots[release.slot].tokens[release.start :]
        self._copy(plan.copies)
        self._check_turns(plan, begun - {*plan.set_back})
        self._check_shape(plan, decoding - {*plan.set_back})
        for piece in plan.pieces:
            self._read(piece)
        for row in plan.rows:
            self._decode(row)
        self._check_room()
        for piece in plan.pieces if is_answered else ():
            if piece.is_last:
                self._choose(piece.key, 1)
        for row in plan.rows:
            if is_answered:
                self._choose(row.key, 1 + self._accepted(row))
            else:
                del self.slots[row.slot].tokens[self.requests[row.key].cached :]
        return plan

    def _copy(self, copies: Sequence[SlotCopy]) -> None:
        written = set()
        for copy in copies:
            source, target = self.slots[copy.source], self.slots[copy.target]
            assert copy.source not in written, "reads what the same plan wrote"
            assert not target.tokens, "writes over what wasn't released"
            assert 0 < copy.length <= len(source.tokens)
            self.slots[copy.target] = Content(source.tokens[: copy.length], source.weights, source.mark)
            written.add(copy.target)

    def _check_turns(self, plan: StepPlan, begun: set[int]) -> None:
        """Only those wait while a younger request begins whose prefix another is about to read."""
        begin = {piece.key for piece in plan.pieces} - begun
        waiting = sorted(self.wanted & {*self.requests} - begun - begin)
        for key in waiting if begin else ():
            if key > max(begin):
                break
            request = self.requests[key]
            others = [self.requests[other] for other in (begun | begin) & self.wanted]
            coming = [other for other in others if other.reading and other.scope == request.scope is not None]
            news = [request.count_alike(other.tokens) - other.cached for other in coming]
            assert max(news, default=0) >= WORTH_WAITING, f"{key} was passed over"

    def _check_shape(self, plan: StepPlan, decoding: set[int]) -> None:
        reading, rows = [piece.key for piece in plan.pieces], [row.key for row in plan.rows]
        assert reading == sorted({*reading} - decoding) and rows == sorted({*rows} & decoding)
        assert len(reading) + len(rows) <= self.max_rows
        assert {*reading, *rows} <= self.wanted
        width = max((piece.end - piece.start for piece in plan.pieces), default=0)
        assert len(reading) * width <= self.chunk
        assert all(0 <= piece.start < piece.end for piece in plan.pieces)
        assert all(piece.start + width <= self.max_seq_len for piece in plan.pieces)
        older = [key for key in sorted(decoding & self.wanted) if key < max(rows, default=-1)]
        assert rows[: len(older)] == older, "a younger request was decoded instead"
        if len(reading) + len(rows) < self.max_rows:
            assert len(rows) == len(decoding & self.wanted), "a request might have gone on"
        oldest = min(self.wanted, default=None)
        if oldest is not None and len(self.requests[oldest].tokens) + self.book.by_hand <= self.book.budget:
            assert oldest in reading or oldest in rows
        assert oldest is not None or not reading + rows

    def _read(self, piece: Piece) -> None:
        request, content = self.requests[piece.key], self.slots[piece.slot]
        assert content.tokens == request.tokens[: piece.start]
        assert piece.is_last == (piece.end == len(request.tokens))
        if request.slot is None:
            self.first_steps.setdefault(piece.key, self.steps)
            assert all(other.slot != piece.slot for other in self.requests.values())
            assert piece.start == self.scheduler.hit(piece.key)
            assert piece.start < len(request.tokens)
            if piece.start:
                assert content.mark == request.scope is not None and not request.reads_all
                # A slot isn't shared any more where its request was admitted before the weights changed.
                assert content.weights == self.weights or not self.book.is_shared(piece.slot)
            request.slot = piece.slot
        assert (request.slot, request.reading) == (piece.slot, True)
        if piece.start == 0:
            content.weights = self.weights
        content.mark = request.mark
        content.tokens += request.tokens[piece.start : piece.end]
        request.cached, request.reading = piece.end, not piece.is_last
        self.computed += piece.end - piece.start

    def _decode(self, row: Row) -> None:
        request, content = self.requests[row.key], self.slots[row.slot]
        assert (request.slot, len(request.tokens) - 1) == (row.slot, row.start)
        assert 1 <= row.count <= 1 + request.proposals
        assert row.start + row.count <= self.max_seq_len
        del content.tokens[row.start :]  # its prompt was read in an interrupted step
        assert content.tokens == request.tokens[: row.start]
        content.tokens += [request.tokens[-1], *[WRONG] * (row.count - 1)]
        self.computed += row.count

    def _accepted(self, row: Row) -> int:
        """How many of its proposals were right."""
        return (row.key + 3 * row.start) % row.count

    def _choose(self, key: int, count: int) -> None:
        request = self.requests[key]
        count = min(count, request.most - len(request.tokens))
        chosen: list[int] = []
        for _ in range(count):
            chosen.append(choose_token(request.tokens + chosen))
        request.tokens += chosen
        self.scheduler.extend(key, chosen)
        request.cached = len(request.tokens) - 1
        tokens = self.slots[request.slot].tokens
        del tokens[request.cached :]
        tokens[len(request.tokens) - count :] = chosen[:-1]
        if len(request.tokens) == request.most:
            self.finish(key)

    def _check_room(self) -> None:
        held = sum(len(content.tokens) for content in self.slots)
        assert held <= self.book.held
        assert held + self.book.by_hand <= self.book.budget or held == 0
        assert self.book.held == sum(self.book.sizes)
