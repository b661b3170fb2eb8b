"""POST /v1/chat/completions: a dialog in, the assistant's next message out, whole or in chunks.

Knows how OpenAI's protocol writes an answer; what is asked and how it is answered is `dialog`'s.
"""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..engine.sequence import Step
from .answer_reader import AnswerReader, write_deltas
from .choices import TokenPlacer, count_usage, describe_logprobs
from .dialog import DialogRequest, Running
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
            placed = self._place(running)
            steps: list[list[Step]] = [[] for _ in running.readers]
            async for row, _, is_over in self._request.read(running):
                if self._body.logprobs:
                    steps[row] += [step for step, _ in placed[row].push(running.readers[row].steps[-1], is_over)]
            usage = count_usage(running.answers, running.tokens, running.reasoning_tokens)
        choices = [self._describe_choice(i, *pair) for i, pair in enumerate(zip(running.readers, steps, strict=True))]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _place(self, running: Running) -> list[TokenPlacer]:
        return [TokenPlacer(self._tokenizer, prompt) for prompt in running.answers.prompts]

    def _describe_choice(self, index: int, reader: AnswerReader, steps: Sequence[Step]) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            logprobs = describe_logprobs(self._tokenizer, steps, self._body.top_logprobs or 0)
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
            placed = self._place(running)
            for i in range(self._request.n):
                yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None}, with_usage)
            async for row, deltas, is_over in self._request.read(running):
                reader = running.readers[row]
                logprobs = self._describe_step(placed[row], reader.steps[-1], is_over)
                for delta in write_deltas(deltas) if deltas or logprobs is None else [{"content": ""}]:
                    yield self._chunk(row, delta, with_usage, logprobs=logprobs)
                    logprobs = None
                if is_over:
                    yield self._chunk(row, {}, with_usage, reason=reader.finish_reason)
            if with_usage:
                usage = count_usage(running.answers, running.tokens, running.reasoning_tokens)
                yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _describe_step(self, placed: TokenPlacer, step: Step, is_over: bool) -> dict[str, Any] | None:
        """The logprobs of the tokens that are certain with a step."""
        if not self._body.logprobs:
            return None
        steps = [certain for certain, _ in placed.push(step, is_over)]
        return describe_logprobs(self._tokenizer, steps, self._body.top_logprobs or 0) if steps else None

    def _chunk(
        self, index: int, delta: dict[str, Any], with_usage: bool, reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk
