"""Several copies of a model behind one port: which one answers a request, and how all of them are.

The first one is the application that this stands before; the others are in other processes. Knows copies and paths;
which copy is best is the router's.
"""

import asyncio
from collections.abc import Mapping

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics, label_copies
from .queue import Queue
from .relay import Relay
from .routed_body import read_routed
from .router import Router, hash_prefixes
from .streams import write_error

FIRST = 0  # the copy of this process
ANSWERING_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")


class Copies:
    """Gives requests that compute something to copies. All others are answered here."""

    def __init__(self, app: ASGIApp, relays: Mapping[int, Relay], router: Router[int], queue: Queue, metrics: Metrics):
        """relays: the other copies, by number. queue: of all copies; metrics: of this process."""
        self._app, self._relays, self._router, self._queue, self._metrics = app, relays, router, queue, metrics
        self._loads = dict.fromkeys([FIRST, *relays], 0)  # answers that are open at each copy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = (scope.get("method"), scope.get("path"))
        if asked == ("GET", "/health"):
            await (await self._look())(scope, receive, send)
        elif asked == ("GET", "/metrics"):
            await Response(await self._read_metrics(), media_type="text/plain; version=0.0.4")(scope, receive, send)
        elif asked[0] == "POST" and asked[1] in ANSWERING_PATHS:
            try:
                await self._answer(scope, receive, send)
            except ApiError as e:
                await JSONResponse(write_error(e, scope["path"]), e.status, e.headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError where there is no room."""
        body = await read_body(receive)
        routed = read_routed(body)
        with self._queue.admit(routed.answers):
            prefixes = hash_prefixes(routed.parts)
            copy = self._router.choose(prefixes, self._loads)
            self._router.note(prefixes, copy)
            self._loads[copy] += routed.answers
            try:
                if copy == FIRST:
                    await self._app(scope, give_back(body, receive), send)
                else:
                    await self._relays[copy].answer(scope, receive, send, body)
            finally:
                self._loads[copy] -= routed.answers

    async def _look(self) -> Response:
        """What /health says: well if all copies are."""
        own = "draining" if self._queue.is_draining else "ok"
        copies = [own, *await asyncio.gather(*(relay.look() for relay in self._relays.values()))]
        status = own if own != "ok" or all(one == "ok" for one in copies) else "failing"
        return JSONResponse({"status": status, "copies": copies}, 200 if status == "ok" else 503)

    async def _read_metrics(self) -> bytes:
        others = await asyncio.gather(*(relay.read_metrics() for relay in self._relays.values()))
        return label_copies([self._metrics.write().decode(), *others])


async def read_body(receive: Receive) -> bytes:
    """The body of a request. A client that goes away meanwhile has sent what it has sent."""
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def give_back(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
