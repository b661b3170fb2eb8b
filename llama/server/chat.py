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
from ..tokenization.tool_calls import find_tool_form
from ..tokenization.tool_parser import Delta
from .answer_reader import AnswerReader, write_deltas
from .choices import count_usage, describe_logprobs, keep_before_stop
from .errors import bad_value, refused, unsupported
from .protocol import ChatBody
from .sampling_options import count_choices, limit_length, read_settings
from .service import Answers, Service
from .tools import read_tools

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
        self._form = find_tool_form(service.llama.formatter)
        self._tools, forced = read_tools(body, self._form)
        if body.response_format is not None and self._tools:
            raise unsupported(
                "response_format", "goes without tools here: an answer that is held to it can't call them"
            )
        if (response_format := forced or body.response_format) is not None:
            self._settings["response_format"] = response_format
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
        if self._tools:
            options["tools"] = self._tools
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
            readers = self._make_readers(answers)
            async for row, _ in self._read(answers, readers):
                if self._is_enough(readers[row]):
                    answers.end(row)
            usage = count_usage(answers, sum(len(reader.steps) for reader in readers))
        choices = [self._describe_choice(i, reader) for i, reader in enumerate(readers)]
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
        with self._service.admit(self._n), await self._begin() as answers:
            readers = self._make_readers(answers)
            for i in range(self._n):
                yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None}, with_usage)
            async for row, deltas in self._read(answers, readers):
                logprobs = self._describe_step(readers[row].steps[-1])
                for delta in write_deltas(deltas) if deltas or logprobs is None else [{"content": ""}]:
                    yield self._chunk(row, delta, with_usage, logprobs=logprobs)
                    logprobs = None
                is_enough = self._is_enough(readers[row])
                if is_enough:
                    answers.end(row)
                if is_enough or readers[row].steps[-1].finish_reason is not None:
                    yield self._chunk(row, {}, with_usage, reason=readers[row].finish_reason)
            if with_usage:
                usage = count_usage(answers, sum(len(reader.steps) for reader in readers))
                yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _make_readers(self, answers: Answers) -> list[AnswerReader]:
        prompt, with_tools = answers.requests[0].sequence.prompt, bool(self._tools)
        return [AnswerReader(self._tokenizer, self._form, with_tools, prompt) for _ in range(self._n)]

    async def _read(self, answers: Answers, readers: list[AnswerReader]) -> AsyncIterator[tuple[int, list[Delta]]]:
        """(choice, what is new in it) for each step, until its answer is over or was ended."""
        async for new in answers.steps():
            for step in new:
                if not answers.is_ended(step.row):
                    yield step.row, readers[step.row].push(step)

    def _is_enough(self, reader: AnswerReader) -> bool:
        """Whether an answer that goes on has the one call that it may have."""
        if self._body.parallel_tool_calls is not False or not reader.has_calls:
            return False
        return reader.steps[-1].finish_reason is None

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
