"""POST /v1/chat/completions: a dialog in, the assistant's next message out, whole or in chunks.

Knows how OpenAI's protocol writes an answer; what is asked and how it is answered is `dialog`'s.
"""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from ..engine.sequence import Step
from .answer_reader import AnswerReader, write_deltas
from .choices import count_usage, describe_logprobs, keep_before_stop
from .dialog import DialogRequest
from .protocol import ChatBody
from .service import Service


class Chat:
    """One request to the endpoint."""

    def __init__(self, service: Service, body: ChatBody):
        """Raises ApiError for what can't be asked."""
        self._request, self._body = DialogRequest(service, body), body
        self._tokenizer = service.llama.tokenizer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.options.model,
        }

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        async with self._request.run() as running:
            async for _ in self._request.read(running):
                pass
            usage = count_usage(running.answers, running.tokens, running.reasoning_tokens)
        choices = [self._describe_choice(i, reader) for i, reader in enumerate(running.readers)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _describe_choice(self, index: int, reader: AnswerReader) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            logprobs = describe_logprobs(self._tokenizer, keep_before_stop(reader.steps), self._body.top_logprobs or 0)
        return {
            "index": index,
            "message": reader.message,
            "finish_reason": reader.finish_reason,
            "logprobs": logprobs,
        }

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks: the role, what is written, an empty one with the reason of its end, and the usage."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        async with self._request.run() as running:
            for i in range(self._request.n):
                yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None}, with_usage)
            async for row, deltas, is_over in self._request.read(running):
                reader = running.readers[row]
                logprobs = self._describe_step(reader.steps[-1])
                for delta in write_deltas(deltas) if deltas or logprobs is None else [{"content": ""}]:
                    yield self._chunk(row, delta, with_usage, logprobs=logprobs)
                    logprobs = None
                if is_over:
                    yield self._chunk(row, {}, with_usage, reason=reader.finish_reason)
            if with_usage:
                usage = count_usage(running.answers, running.tokens, running.reasoning_tokens)
                yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _describe_step(self, step: Step) -> dict[str, Any] | None:
        """The logprobs of a step whose token belongs to the answer."""
        is_stop = step.finish_reason == "stop" and step.token == step.stop
        if not self._body.logprobs or is_stop:
            return None
        return describe_logprobs(self._tokenizer, [step], self._body.top_logprobs or 0)

    def _chunk(
        self, index: int, delta: dict[str, Any], with_usage: bool, reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk
