"""The application: which function answers which path, who may ask, how much, and what is logged.

Knows HTTP; what an endpoint does is its module's.
"""

import hmac
import logging
import time
from collections.abc import Callable, Collection
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import LlamaError
from .anthropic import CountBody, MessageAnswer, MessageBody, count_tokens
from .chat import Chat
from .completions import Completion
from .errors import ApiError, failed, invalid, refused
from .page import respond_with_page
from .protocol import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from .responses import ResponseAnswer, ResponseBody
from .service import Service
from .stopping import Failure, FailureGuard
from .streams import respond, respond_whole, write_error
from .texts import detokenize, embed, tokenize

LOG = logging.getLogger("llama.server")
HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
OPEN_PATHS = ("/", "/health", "/metrics")  # that need no key


def make_app(
    service: Service, failure: Failure | None = None, copies: Callable[[ASGIApp], ASGIApp] | None = None
) -> FastAPI:
    """The application, which answers once the engine serves.

    failure: that this process may come to. copies: what stands before the application and gives requests to others.
    """
    app = FastAPI(title="llama", version="1")
    add_errors(app)
    add_endpoints(app, service)
    if copies is not None:
        app.add_middleware(copies)
    if failure is not None:
        app.add_middleware(FailureGuard, failure=failure)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(Guard, service=service, paths=paths)
    if service.options.cors_origin is not None:
        app.add_middleware(
            CORSMiddleware, allow_origins=[service.options.cors_origin], allow_methods=["*"], allow_headers=["*"]
        )
    return app


def add_errors(app: FastAPI) -> None:
    """Every error is the API's error object."""

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> Response:
        return JSONResponse(write_error(error, request.url.path), error.status, error.headers)

    @app.exception_handler(LlamaError)
    async def tell_refusal(request: Request, error: LlamaError) -> Response:
        return await tell(request, refused(error))

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def tell_mistake(request: Request, error: RequestValidationError | ValidationError) -> Response:
        return await tell(request, invalid(error))

    @app.exception_handler(HTTPException)
    async def tell_status(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # of `Guard`, while the body was read
            return await tell(request, error.__cause__)
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = HTTP_CODES.get(error.status_code, "invalid_request")
        return await tell(request, ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def tell_failure(request: Request, error: Exception) -> Response:
        return await tell(request, failed(error))


def add_endpoints(app: FastAPI, service: Service) -> None:
    model = {"id": service.options.model, "object": "model", "created": service.created, "owned_by": "llama"}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await respond(request, Chat(service, body), body.stream)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await respond(request, Completion(service, body), body.stream)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponseBody) -> Response:
        return await respond(request, ResponseAnswer(service, body), body.stream)

    @app.post("/v1/messages")
    async def messages(request: Request, body: MessageBody) -> Response:
        return await respond(request, MessageAnswer(service, body), body.stream)

    @app.post("/v1/messages/count_tokens")
    async def count(body: CountBody) -> Response:
        return JSONResponse(await service.call(count_tokens, service, body))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        return await respond_whole(request, partial(embed, service, body))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)

    @app.post("/tokenize")
    async def tokens_of(body: TokenizeBody) -> Response:
        return JSONResponse(await service.call(tokenize, service, body))

    @app.post("/detokenize")
    async def text_of(body: DetokenizeBody) -> Response:
        return JSONResponse(await service.call(detokenize, service, body))

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return respond_with_page()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "draining" if service.queue.is_draining else "ok"}, 503 if service.queue.is_draining else 200
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.write(), media_type="text/plain; version=0.0.4")


class Guard:
    """Asks for the key, bounds the body, and logs a line for each request, without what it says."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]):
        """paths: those that are counted by their names."""
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._find_refusal(scope)
            if error is None:
                await self._app(scope, self._bound(receive), watch)
            else:
                body = write_error(error, scope["path"])
                await JSONResponse(body, error.status, error.headers)(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()
            # As it was sent, so that no character of it begins a line.
            sent = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            LOG.info("%s %s %d %.3f s", scope["method"], sent, status, time.monotonic() - started)

    def _find_refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._service.options.max_body:
            return too_large(self._service.options.max_body)
        key = self._service.options.api_key
        if key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if hmac.compare_digest(given, key.encode()):
            return None
        return ApiError(
            401, "Incorrect API key provided.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )

    def _bound(self, receive: Receive) -> Receive:
        """`receive`, up to so many bytes of a body whose length the client doesn't say."""
        left = self._service.options.max_body

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise too_large(self._service.options.max_body)
            return message

        return bounded


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
