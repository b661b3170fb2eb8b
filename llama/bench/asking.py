"""A client of the stress test: sends a body, and reads the answer to its end or goes away before it.

Knows HTTP and events; knows no model, and no endpoint's fields.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Address = tuple[str, int]  # host and port
READ_BYTES = 1 << 16  # of an answer at a time, at most
SECONDS = 120.0  # without a byte, after which an answer hangs


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    status: int | None  # None: nothing came before the client went away
    body: bytes = b""
    is_whole: bool = True  # whether the client stayed until the end

    def read(self) -> Any:
        """The body as JSON. Raises ValueError."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream that have come; "[DONE]" is one of them."""
        return [*read_events(self.body)]


def ask(
    address: Address,
    path: str,
    body: bytes,
    leave_after: float | None = None,
    on_piece: Callable[[bytes], None] | None = None,
) -> Reply:
    """Send a body to a path. Raises OSError or HTTPException where the connection breaks, TimeoutError for a hang.

    leave_after: seconds until the client goes away; None: it stays. on_piece: called with each part of the answer.
    """
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    leaving = None if leave_after is None else time.monotonic() + leave_after
    status, pieces = None, list[bytes]()
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", "Connection": "close"})
        assert connection.sock is not None
        connection.sock.settimeout(find_patience(leaving))
        sock = connection.sock
        response = connection.getresponse()
        status = response.status
        while True:
            sock.settimeout(find_patience(leaving))
            if not (piece := response.read1(READ_BYTES)):
                return Reply(status, b"".join(pieces))
            pieces.append(piece)
            if on_piece is not None:
                on_piece(piece)
    except TimeoutError:
        if leaving is None:
            raise
        return Reply(status, b"".join(pieces), is_whole=False)
    finally:
        connection.close()


def find_patience(leaving: float | None) -> float:
    """Seconds to wait for the next bytes. leaving: when the client goes away. Raises TimeoutError if that is now."""
    if leaving is None:
        return SECONDS
    if (left := leaving - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def ask_json(address: Address, path: str, body: Mapping[str, Any]) -> Reply:
    return ask(address, path, json.dumps(body).encode())


def get(address: Address, path: str) -> bytes:
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def read_events(body: bytes) -> Iterator[Any]:
    """What stands in the whole events of a stream."""
    for block in body.split(b"\n\n")[:-1]:
        for line in block.split(b"\n"):
            if line.startswith(b"data: "):
                data = line.removeprefix(b"data: ")
                yield "[DONE]" if data == b"[DONE]" else json.loads(data)
