"""POST /v1/chat/completions: a dialog in, the assistant's next message out, whole or in chunks.

Knows the endpoint's fields; knows no socket.
"""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from ..engine.sequence import OutputOptions, Step
from ..errors import LlamaError
from ..tokenization.messages import DialogOptions
from ..tokenization.texts import read_content
from .choices import count_usage, describe_logprobs, keep_before_stop
from .errors import bad_value, refused, unsupported
from .protocol import ChatBody
from .sampling_options import count_choices, limit_length, read_settings
from .service import Answers, Service

MESSAGE_KEYS = {"role", "content", "name", "refusal", "tool_calls", "tool_call_id", "reasoning_content"}


class Chat:
    """One request to the endpoint."""

    def __init__(self, service: Service, body: ChatBody):
        """Raises ApiError for what can't be asked."""
        service.check_model(body.model)
        self._service, self._body = service, body
        self._tokenizer = service.llama.tokenizer
        self._settings = read_settings(body)
        self._n = count_choices(body.n)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_value("top_logprobs goes with logprobs: true", "top_logprobs")
        check_unsupported(body)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.options.model,
        }

    async def _begin(self) -> Answers:
        body, service = self._body, self._service
        prompt = await service.call(self._encode)
        asked, param = body.max_completion_tokens, "max_completion_tokens"
        asked, param = (body.max_tokens, "max_tokens") if asked is None else (asked, param)
        if asked == 0:
            raise bad_value(f"{param} is 0, expected at least 1", param)
        limit_length(len(prompt), asked, service.max_seq_len, param if asked is not None else "messages")
        if asked is not None:
            self._settings["max_gen_len"] = asked
        output = OutputOptions(bool(body.logprobs), False, body.top_logprobs or 0)
        return await service.submit([prompt], self._settings, output, self._n, body.cache_prompt)

    def _encode(self) -> list[int]:
        body = self._body
        options: DialogOptions = {}
        if body.tools and body.tool_choice != "none":
            options["tools"] = body.tools
        if body.chat_template_kwargs is not None:
            options["chat_template_kwargs"] = body.chat_template_kwargs
        messages = [rename_role(message) for message in body.messages]
        check_keys(body.messages)
        try:
            return self._service.llama.formatter.encode_dialog_prompt(messages, **options)  # type: ignore[arg-type]
        except LlamaError as e:
            raise refused(e, "messages") from e

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        with self._service.admit(self._n), await self._begin() as answers:
            steps: list[list[Step]] = [[] for _ in range(self._n)]
            async for new in answers.steps():
                for step in new:
                    steps[step.row].append(step)
            usage = count_usage(answers, sum(map(len, steps)))
        choices = [self._describe_choice(i, own) for i, own in enumerate(steps)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _describe_choice(self, index: int, steps: list[Step]) -> dict[str, Any]:
        content = read_content(self._tokenizer, "".join(step.text for step in steps))
        message = {"role": "assistant", "content": content, "refusal": None}
        kept = keep_before_stop(steps)
        logprobs = (
            describe_logprobs(self._tokenizer, kept, self._body.top_logprobs or 0) if self._body.logprobs else None
        )
        reason = steps[-1].finish_reason if steps else "length"
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks: the role, the content, an empty one with the reason of its end, and the usage."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        with self._service.admit(self._n), await self._begin() as answers:
            written, shown, count = [""] * self._n, [0] * self._n, 0
            for i in range(self._n):
                yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None}, with_usage)
            async for new in answers.steps():
                count += len(new)
                for step in new:
                    row = step.row
                    written[row] += step.text
                    content = read_content(self._tokenizer, written[row])
                    delta, shown[row] = content[shown[row] :], len(content)
                    logprobs = self._describe_step(step)
                    if delta or logprobs:
                        yield self._chunk(row, {"content": delta}, with_usage, logprobs=logprobs)
                    if step.finish_reason is not None:
                        yield self._chunk(row, {}, with_usage, reason=step.finish_reason)
            if with_usage:
                usage = count_usage(answers, count)
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


def check_keys(messages: list[dict[str, Any]]) -> None:
    """Raise ApiError for a key of a message that the API doesn't have."""
    for i, message in enumerate(messages):
        if unknown := sorted(message.keys() - MESSAGE_KEYS):
            raise bad_value(
                f"messages[{i}] has the unknown key {unknown[0][:40]!r}", f"messages[{i}].{unknown[0][:40]}"
            )


def rename_role(message: dict[str, Any]) -> dict[str, Any]:
    """The API's newer name of the system's role is what templates call "system"."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def check_unsupported(body: ChatBody) -> None:
    """Raise ApiError for what the API has and this server doesn't."""
    if body.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "is none or auto here: a call can't be forced")
    if body.tool_choice == "auto" and not body.tools:
        raise bad_value("tool_choice goes with tools", "tool_choice")
    if body.response_format not in (None, {"type": "text"}):
        raise unsupported("response_format", "is text here")
    if body.tools and body.tool_choice != "none":
        raise unsupported("tools", "can't be called yet: drop it, or send tool_choice: none")
