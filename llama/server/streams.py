"""Answers to a client, whole or as events, which end when the client has gone.

Knows HTTP's responses; knows no endpoint's fields.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .errors import ApiError, failed

T = TypeVar("T")
GONE = 499  # the status of a request whose client has gone, which nobody reads
STATUS_NAMES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


class EventStyle:
    """How a protocol writes its events and errors: OpenAI's have no names, and end with a mark."""

    ending = "data: [DONE]\n\n"

    def write(self, event: dict[str, Any]) -> str:
        return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def write_error(self, error: ApiError) -> dict[str, Any]:
        return error.body


class NamedEvents(EventStyle):
    """Anthropic's have names, which are their types."""

    ending = ""

    def write(self, event: dict[str, Any]) -> str:
        return f"event: {event['type']}\n{super().write(event)}"

    def write_error(self, error: ApiError) -> dict[str, Any]:
        kind = STATUS_NAMES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}


PLAIN, NAMED = EventStyle(), NamedEvents()


def find_style(path: str) -> EventStyle:
    """How the endpoint at a path writes events."""
    return NAMED if path.startswith(("/v1/messages", "/v1/responses")) else PLAIN


def write_error(error: ApiError, path: str) -> dict[str, Any]:
    """The error object of the protocol that a path belongs to."""
    return NAMED.write_error(error) if path.startswith("/v1/messages") else PLAIN.write_error(error)


async def stream_events(
    first: dict[str, Any] | None, events: AsyncIterator[dict[str, Any]], style: EventStyle
) -> AsyncIterator[str]:
    """Events as text; an error after the first one is an event too. first: the first event; None: there is none."""
    try:
        if first is not None:
            yield style.write(first)
        async for event in events:
            yield style.write(event)
    except ApiError as e:
        yield style.write(style.write_error(e))
    except Exception as e:
        yield style.write(style.write_error(failed(e)))
        raise
    yield style.ending


class Answer(Protocol):
    """A request to an endpoint that generates."""

    def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in events."""

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""


async def respond(request: Request, answer: Answer, streams: bool | None) -> Response:
    """The answer in events, as its path's protocol writes them, or as a whole. Raises ApiError."""
    if streams:
        return await respond_with_events(request, answer.stream(), find_style(request.url.path))
    return await respond_whole(request, answer.complete)


async def respond_with_events(request: Request, events: AsyncIterator[dict[str, Any]], style: EventStyle) -> Response:
    """A stream of events. What goes wrong before the first one is told by the status. Raises ApiError.

    A client may go away while it waits for the first one too.
    """
    first = await unless_gone(request, find_first(events))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream_events(first, events, style), media_type="text/event-stream", headers=headers)


async def find_first(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


async def respond_whole(request: Request, compute: Callable[[], Awaitable[Any]]) -> Response:
    """What a function computes, as JSON. It is cancelled when the client goes away."""
    answer = await unless_gone(request, compute())
    return Response(status_code=GONE) if answer is None else JSONResponse(answer)


async def unless_gone(request: Request, computed: Awaitable[T]) -> T | None:
    """What is computed; None where the client goes away before, which ends it."""
    computing = asyncio.ensure_future(computed)
    leaving = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait((computing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return computing.result() if computing.done() else None
    finally:
        for task in (computing, leaving):
            task.cancel()
        await asyncio.gather(computing, leaving, return_exceptions=True)


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
