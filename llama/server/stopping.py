"""How a server ends: once it has answered what it heard, at once if it is told again, or because a rank was lost.

Knows signals and HTTP's responses; knows no model.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._util.heartbeat import find_heartbeat
from .errors import ApiError, lost_rank
from .queue import Queue
from .streams import find_style, write_error

SECONDS_TO_TELL = 2


class DrainingServer(uvicorn.Server):
    """A server that after SIGTERM or Ctrl-C refuses new answers, and ends when those under way have ended.

    A second signal ends it at once. uvicorn's own would close its port first, and end by the signal in the end.
    """

    def __init__(self, config: uvicorn.Config, queue: Queue):
        super().__init__(config)
        self._queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._queue.is_draining:
            self.should_exit = self.force_exit = True
        self._queue.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether the server is to end."""
        if self._queue.is_draining and not self._queue.open:
            self.should_exit = True
        return await super().on_tick(counter)


class Failure:
    """That this process is about to end, and why. Requests that are open then are answered with that."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()
        self.open = 0  # requests
        self.error: ApiError | None = None

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """A context in which a rank that is lost is told to clients, before the heartbeat ends this process."""
        if (heartbeat := find_heartbeat()) is None:
            yield
            return
        heartbeat.before_end.append(self.tell)
        try:
            yield
        finally:
            heartbeat.before_end.remove(self.tell)

    def tell(self, message: str) -> None:
        """Answer all open requests with an error, and wait until they have it, for a short time. For another thread."""
        self.error = lost_rank(message)
        if self._loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._told.set)
        end = time.monotonic() + SECONDS_TO_TELL
        while self.open and time.monotonic() < end:
            time.sleep(0.01)

    async def wait(self) -> ApiError:
        self._loop = asyncio.get_running_loop()
        if self.error is None:
            await self._told.wait()
        assert self.error is not None
        return self.error


class FailureGuard:
    """Ends open requests with an error where the process is about to end."""

    def __init__(self, app: ASGIApp, failure: Failure):
        self._app, self._failure = app, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = Sent(send)
        answering = asyncio.ensure_future(self._app(scope, receive, sent))
        failing = asyncio.ensure_future(self._failure.wait())
        self._failure.open += 1
        try:
            await asyncio.wait((answering, failing), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
                await asyncio.wait((answering,))
                await sent.finish(failing.result(), scope, receive)
            elif (error := answering.exception()) is not None:
                raise error
        finally:
            answering.cancel()
            failing.cancel()
            self._failure.open -= 1


class Sent:
    """What was sent of a response."""

    def __init__(self, send: Send):
        self._send = send
        self._has_begun = self._is_over = self._has_events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            types = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._has_events = any(value.startswith(b"text/event-stream") for value in types)
        else:
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """End the response with an error."""
        if not self._has_begun:
            await JSONResponse(write_error(error, scope["path"]), error.status)(scope, receive, self._send)
        elif not self._is_over:
            style = find_style(scope["path"])
            text = "\n\n" + style.write(style.write_error(error)) + style.ending if self._has_events else ""
            await self._send({"type": "http.response.body", "body": text.encode(), "more_body": False})
