"""How many answers there may be, and whether new ones are taken.

Knows the API's errors; knows no model.
"""

import contextlib
from collections.abc import Iterator

from .errors import ApiError

RETRY_SECONDS = 1


class Queue:
    """Answers that wait or are under way."""

    def __init__(self, limit: int):
        self.limit = limit
        self.open = 0
        self.is_draining = False  # whether nothing new is taken, since the server is being stopped

    @contextlib.contextmanager
    def admit(self, answers: int, param: str | None = None) -> Iterator[None]:
        """Room for so many answers. param: the field that asks for them. Raises ApiError where there is none."""
        if self.is_draining:
            raise ApiError(503, "the server is being stopped", kind="server_error", code="shutting_down")
        if answers > self.limit:
            message = f"{answers} answers were asked for, and the queue holds {self.limit}"
            raise ApiError(400, message, param=param, code="invalid_value")
        if self.open + answers > self.limit:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            message = "the queue is full: try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)
        self.open += answers
        try:
            yield
        finally:
            self.open -= answers
