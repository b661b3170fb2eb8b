"""What a client is told when its request can't be answered: the API's own error object, with its status.

Knows HTTP's statuses; knows no model.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from .._util.heartbeat import name_lost_rank
from .._util.ranks import is_lost_rank
from ..errors import LlamaError

# Fields with whose names the library begins what it says of them.
TOLD_FIRST = re.compile(r"(stop|logit_bias|response_format|prompt|tool_choice|tools|num_beams|temperature)\b")
INSTEAD = {
    "suffix": "the server only continues texts; leave it out, and write what comes before as the prompt",
    "store": "the server keeps nothing; send false or leave it out",
    "truncation": "the server cuts no dialog; leave it out, and send a shorter input",
    "text.verbosity": "the model has no such setting; leave it out, and ask for it in the instructions",
    "service_tier": "the server has one tier; send auto or leave it out",
    "include": "the server has only message.output_text.logprobs; leave others out",
    "modalities": "the server answers with text; send ['text'] or leave it out",
    "stream_options.include_obfuscation": "the server adds nothing to chunks; send false or leave it out",
}


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


def unknown_key(place: str, key: str) -> ApiError:
    """A key of an object within a body that the API, or this server, doesn't have."""
    return bad_value(f"{place} has the unknown key {key[:40]!r}", f"{place}.{key[:40]}")


def too_late(seconds: float) -> ApiError:
    """An answer that wasn't there after so long."""
    message = f"the answer took more than {seconds:.0f} s"
    return ApiError(504, message, kind="server_error", code="timeout")


def lost_rank(message: str) -> ApiError:
    """Another rank of the model has ended, as the message says."""
    return ApiError(503, message, kind="server_error", code="lost_rank")


def refused(error: LlamaError, param: str | None = None) -> ApiError:
    """A request that the library refuses."""
    told = TOLD_FIRST.match(str(error))
    param = param or (told[1] if told else None)
    return find_loss(error) or ApiError(400, str(error), param=param, code="invalid_value")


@contextlib.contextmanager
def rename_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors within tell of fields by these names, which the client used."""
    try:
        yield
    except ApiError as e:
        told = e.body["error"]
        first = re.split(r"[.\[]", told["param"] or "")[0]
        if first in names:
            told["message"] = re.sub(rf"\b{first}\b(\[\d+\])?", names[first], told["message"])
            told["param"] = names[first]
        raise


def failed(error: Exception) -> ApiError:
    """An answer that could not be computed, through no fault of the client's."""
    return find_loss(error) or ApiError(500, str(error), kind="server_error", code="internal_error")


def find_loss(error: BaseException | None) -> ApiError | None:
    """That a rank of the model has ended, if that is what an error comes from."""
    while error is not None and not is_lost_rank(error):
        error = error.__cause__
    if error is None:
        return None
    return lost_rank(f"{name_lost_rank()} of the model has ended")


def invalid(error: RequestValidationError | ValidationError) -> ApiError:
    """A body that doesn't have the form of its endpoint."""
    errors = error.errors()
    first, param = errors[0], find_field(errors[0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.", code="invalid_json")
    if param is None and isinstance(first["input"], bytes):
        return ApiError(400, "Content-Type must be application/json", code="invalid_content_type")
    name = re.sub(r"\[.*", "", param or "")
    if first["type"] in ("literal_error", "none_required") and name in INSTEAD:
        return unsupported(name, f"can't have this value here: {INSTEAD[name]}")
    said = dict.fromkeys(one["msg"] for one in errors if find_field(one) == param)  # of each type that may be there
    message = f"{param or 'the body'}: {'; or: '.join(said)}"
    return ApiError(400, message, param=param, code="invalid_type" if "type" in first["type"] else "invalid_value")


def find_field(error: Mapping[str, Any]) -> str | None:
    """The field that an error is about, without the types that it may have."""
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("body", "str", "int", "bool") and "[" not in part:
            path += f".{part}" if path else part
    return path or None
