"""Answers to a client, whole or as events, which end when the client has gone.

Knows HTTP's responses; knows no endpoint's fields.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .errors import ApiError, failed

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


async def respond_with_events(events: AsyncIterator[dict[str, Any]], style: EventStyle) -> Response:
    """A stream of events. What goes wrong before the first one is told by the status. Raises ApiError."""
    first = await anext(events, None)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream_events(first, events, style), media_type="text/event-stream", headers=headers)


async def respond_whole(request: Request, compute: Callable[[], Awaitable[Any]]) -> Response:
    """What a function computes, as JSON. It is cancelled when the client goes away."""
    computing = asyncio.ensure_future(compute())
    leaving = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait((computing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not computing.done():
            return Response(status_code=GONE)
        return JSONResponse(computing.result())
    finally:
        for task in (computing, leaving):
            task.cancel()
        await asyncio.gather(computing, leaving, return_exceptions=True)


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
