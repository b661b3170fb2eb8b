"""Requests of clients and requests of the engine: how many there may be, and answers as they come, without a wait.

The event loop only looks at what the engine's thread has left. Knows the engine; knows no protocol.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..engine.request import Request, raise_failures
from ..engine.sequence import OutputOptions, Step
from ..engine.sequence_maker import CallOptions
from ..errors import LlamaError
from ..generation import Llama
from .errors import ApiError, failed, refused, too_late
from .metrics import Metrics
from .queue import Queue

T = TypeVar("T")
MOST_SEARCHES = 8  # beam searches at a time; others wait


@dataclass(frozen=True)
class ServerOptions:
    """What whoever starts a server decides."""

    model: str  # the name that clients see
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of requests that don't set them
    api_key: str | None = None  # that clients have to send; None: none
    cors_origin: str | None = None  # whose pages in browsers may send requests; None: no one's
    max_queue: int = 256  # answers that may wait or be under way
    max_body: int = 4 << 20  # bytes of a request
    timeout: float = 600.0  # seconds that an answer may take


class Service:
    """A model that answers clients."""

    def __init__(self, llama: Llama, options: ServerOptions):
        self.llama, self.options = llama, options
        self.metrics = Metrics()
        self.created = int(time.time())
        self.queue = Queue(options.max_queue)
        self.searches = ThreadPoolExecutor(MOST_SEARCHES, "llama-search")  # the threads of beam searches
        self.metrics.open.set_function(lambda: self.queue.open)

    @property
    def max_seq_len(self) -> int:
        return self.llama.model.params.max_seq_len

    def admit(self, answers: int, param: str | None = None) -> contextlib.AbstractContextManager[None]:
        """A context with room in the queue for so many answers, which `param` asks for. Raises ApiError."""
        return self.queue.admit(answers, param)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for another model than that which is served."""
        if name is not None and name != self.options.model:
            message = f"The model `{name}` does not exist; this server has `{self.options.model}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """What a function returns that may take a while, such as encoding a text. Raises ApiError for a LlamaError."""
        try:
            return await asyncio.to_thread(function, *arguments, **named)
        except LlamaError as e:
            raise refused(e) from e

    async def submit(
        self, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any], output: OutputOptions, n: int, reuse: bool
    ) -> "Answers":
        """n answers to each prompt."""
        answers = Answers(asyncio.get_running_loop(), self.options.timeout, self.metrics)
        options = CallOptions(output, n, reuse=reuse, notify=answers.notify)
        make = self.llama.engine.make_requests
        answers.requests = await self.call(make, prompts, {**self.options.defaults, **settings}, None, options)
        return answers


class Answers:
    """Answers that are under way. A context, at whose end those that aren't over are cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, metrics: Metrics):
        self.requests: list[Request] = []
        self._loop, self._news, self._metrics = loop, asyncio.Event(), metrics
        self._timeout, self._is_late = timeout, False
        self._alarm: asyncio.TimerHandle | None = None
        self._ended: set[int] = set()

    def notify(self) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    def __enter__(self) -> "Answers":
        self._alarm = self._loop.call_later(self._timeout, self._be_late)
        return self

    def _be_late(self) -> None:
        self._is_late = True
        self._news.set()

    def __exit__(self, *_: object) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        for request in self.requests:
            request.cancel()

    def end(self, row: int) -> None:
        """The answer with this place gets no more steps."""
        self._ended.add(row)
        self.requests[row].cancel()

    def is_ended(self, row: int) -> bool:
        return row in self._ended

    async def steps(self) -> AsyncIterator[list[Step]]:
        """New steps of all answers, until all are over. Raises ApiError where one fails, or for a timeout."""
        started = last = time.monotonic()
        while True:
            if new := [step for request in self.requests for step in request.take()]:
                now = time.monotonic()
                self._metrics.note_tokens(len(new), now - started if last == started else None, now - last)
                last = now
                yield new
            try:
                raise_failures([request.sequence for request in self.requests])
            except LlamaError as e:
                raise failed(e) from e
            if all(request.is_over for request in self.requests):
                self._metrics.note_prompts(self.prompt_tokens, self.cached_tokens)
                return
            await self._news.wait()
            self._news.clear()
            if self._is_late:
                raise too_late(self._timeout)

    @property
    def prompts(self) -> list[list[int]]:
        """The prompt of each answer."""
        return [request.sequence.prompt for request in self.requests]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once whatever n is."""
        prompts = {id(r.sequence.twin or r.sequence): len(r.sequence.prompt) for r in self.requests}
        return sum(prompts.values())

    @property
    def cached_tokens(self) -> int:
        firsts = {id(r.sequence.twin or r.sequence): (r.sequence.twin or r.sequence).hit for r in self.requests}
        return sum(firsts.values())
