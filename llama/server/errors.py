"""What a client is told when its request can't be answered: the API's own error object, with its status.

Knows HTTP's statuses; knows no model.
"""

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from .._util.heartbeat import name_lost_rank
from .._util.ranks import is_lost_rank
from ..errors import LlamaError


class ApiError(Exception):
    """A request that is refused, or that failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_value(message: str, param: str) -> ApiError:
    """A value that a parameter can't have."""
    return ApiError(400, message, param=param, code="invalid_value")


def unsupported(param: str, why: str) -> ApiError:
    """A parameter of the API that this server doesn't have."""
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


def refused(error: LlamaError, param: str | None = None) -> ApiError:
    """A request that the library refuses."""
    return find_loss(error) or ApiError(400, str(error), param=param, code="invalid_value")


def failed(error: Exception) -> ApiError:
    """An answer that could not be computed, through no fault of the client's."""
    return find_loss(error) or ApiError(500, str(error), kind="server_error", code="internal_error")


def find_loss(error: BaseException | None) -> ApiError | None:
    """That a rank of the model has ended, if that is what an error comes from."""
    while error is not None and not is_lost_rank(error):
        error = error.__cause__
    if error is None:
        return None
    return ApiError(503, f"{name_lost_rank()} of the model has ended", kind="server_error", code="lost_rank")


def invalid(error: RequestValidationError | ValidationError) -> ApiError:
    """A body that doesn't have the form of its endpoint."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.", code="invalid_json")
    message = f"{param or 'the body'}: {first['msg']}"
    return ApiError(400, message, param=param, code="invalid_type" if "type" in first["type"] else "invalid_value")
