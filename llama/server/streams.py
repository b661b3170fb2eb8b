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

DONE = "[DONE]"
GONE = 499  # the status of a request whose client has gone, which nobody reads


def write_event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def stream_events(first: Any, events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Events as bytes; an error after the first one is an event too. first: the first event, or None."""
    try:
        if first is not None:
            yield write_event(first)
        async for event in events:
            yield write_event(event)
    except ApiError as e:
        yield write_event(e.body)
    except Exception as e:
        yield write_event(failed(e).body)
        raise
    yield write_event(DONE)


async def respond_with_events(events: AsyncIterator[Any]) -> Response:
    """A stream of events. What goes wrong before the first one is told by the status. Raises ApiError."""
    first = await anext(events, None)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream_events(first, events), media_type="text/event-stream", headers=headers)


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
