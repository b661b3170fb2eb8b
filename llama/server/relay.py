"""A copy of the model in another process, which answers over HTTP: what clients ask is passed on, and its answers too.

Knows HTTP's messages; knows no endpoint and no router.
"""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .streams import find_style, unless_gone, write_error

# Headers that are of one connection, or that a relay decides itself.
OWN_HEADERS = {
    *(b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"host", b"content-length"),
    *(b"authorization", b"x-api-key", b"accept-encoding", b"date", b"server", b"expect"),
}
SECONDS_TO_CONNECT, SECONDS_TO_LOOK = 5, 2


class Relay:
    """One copy, as the process sees it that clients are connected with."""

    def __init__(self, name: str, url: str, key: str):
        """name: of the copy, for messages. key: that the copy asks for."""
        self._name = name
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(None, connect=SECONDS_TO_CONNECT),  # how long an answer may take is the copy's
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy of the environment's
        )

    async def answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Answer a client's request, whose body was read. What is computed for a client that goes away is ended."""
        response: httpx2.Response | None = None
        try:
            response = await unless_gone(Request(scope, receive), self._send(scope, body))
            if response is not None:
                await self._make_answer(scope, response)(scope, receive, send)
        except httpx2.TransportError:
            error = self._describe_loss()
            await JSONResponse(write_error(error, scope["path"]), error.status)(scope, receive, send)
        finally:
            if response is not None:
                await response.aclose()

    async def _send(self, scope: Scope, body: bytes) -> httpx2.Response:
        """The response; that of one that isn't streamed as a whole."""
        headers = [(name, value) for name, value in scope["headers"] if name not in OWN_HEADERS]
        request = self._client.build_request(scope["method"], scope["path"], headers=headers, content=body)
        response = await self._client.send(request, stream=True)
        if not has_events(response):
            await response.aread()
        return response

    def _make_answer(self, scope: Scope, response: httpx2.Response) -> Response:
        if has_events(response):
            answer: Response = StreamingResponse(self._pass_on(scope, response), response.status_code)
        else:
            answer = Response(response.content, response.status_code)
        own = [(name, value) for name, value in answer.raw_headers if name == b"content-length"]
        answer.raw_headers = own + [(n.lower(), v) for n, v in response.headers.raw if n.lower() not in OWN_HEADERS]
        return answer

    async def _pass_on(self, scope: Scope, response: httpx2.Response) -> AsyncIterator[bytes]:
        try:
            async for data in response.aiter_bytes():
                yield data
        except httpx2.TransportError:
            style = find_style(scope["path"])
            yield f"\n\n{style.write(style.write_error(self._describe_loss()))}{style.ending}".encode()

    def _describe_loss(self) -> ApiError:
        message = f"{self._name} of the model, which this request was given to, has ended: try again"
        return ApiError(503, message, kind="server_error", code="lost_copy")

    async def look(self) -> str:
        """How the copy is: ok, or what it is instead."""
        try:
            return (await self._client.get("/health", timeout=SECONDS_TO_LOOK)).json()["status"]
        except (httpx2.HTTPError, ValueError):
            return "unreachable"

    async def read_metrics(self) -> str:
        """Its figures, as Prometheus reads them; none where it can't be reached."""
        try:
            return (await self._client.get("/metrics", timeout=SECONDS_TO_LOOK)).text
        except httpx2.HTTPError:
            return ""

    async def close(self) -> None:
        await self._client.aclose()


def has_events(response: Any) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")
