"""A dialog that is answered: its prompt, its settings and tools, and what is written in answer, as it comes.

Knows a dialog's body, which several protocols make; knows none of their ways to write an answer.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..engine.sequence import OutputOptions
from ..tokenization.messages import DialogOptions
from ..tokenization.tool_calls import find_tool_form
from ..tokenization.tool_parser import Delta
from .answer_reader import AnswerReader
from .beams import Search, begin_search
from .errors import bad_value, rename_fields, unsupported
from .messages import encode_dialog
from .protocol import ChatBody
from .sampling_options import check_length, count_choices, read_settings
from .service import Answers, Service
from .tools import read_tools

NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Running:
    """Answers that are under way, and the reader of each."""

    answers: Answers | Search
    readers: list[AnswerReader]

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return sum(len(reader.steps) for reader in self.readers)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that belong to reasoning."""
        return sum(reader.reasoning_tokens for reader in self.readers)


class DialogRequest:
    """One dialog to answer."""

    def __init__(self, service: Service, body: ChatBody, names: Mapping[str, str] = NO_NAMES):
        """names: what the protocol calls fields, where a chat calls them otherwise. Raises ApiError."""
        self._names = names
        with rename_fields(names):
            self._take(service, body)

    def _take(self, service: Service, body: ChatBody) -> None:
        service.check_model(body.model)
        self._service, self._body = service, body
        self._settings = read_settings(body)
        self.n = count_choices(body.n)
        self._form = find_tool_form(service.llama.formatter)
        self._tools, forced = read_tools(body, self._form, service.llama.tokenizer)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_value("top_logprobs goes with logprobs: true", "top_logprobs")
        if body.response_format not in (None, {"type": "text"}) and self._tools:
            raise unsupported("response_format", "goes without tools here: an answer held to it can't call them")
        if forced and body.has_beams:
            raise unsupported("tool_choice", "is none or auto with num_beams: beams can't be held to a call")
        if (response_format := forced or body.response_format) is not None:
            self._settings["response_format"] = response_format
        self._is_held = response_format not in (None, {"type": "text"})

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Running]:
        """The answers; at the end of the context those that aren't over are cancelled."""
        param = "num_beams" if self._body.has_beams else "n"
        with self._service.admit(max(self.n, self._body.num_beams or 1), param), await self._begin() as answers:
            with_tools = bool(self._tools)
            prompt = [] if self._is_held else answers.prompts[0]  # what is held to a form has no place to think first
            tokenizer = self._service.llama.tokenizer
            yield Running(answers, [AnswerReader(tokenizer, self._form, with_tools, prompt) for _ in range(self.n)])

    async def _begin(self) -> Answers | Search:
        with rename_fields(self._names):
            return await self._submit()

    async def _submit(self) -> Answers | Search:
        body, service = self._body, self._service
        prompt = await service.call(self.encode)
        asked, param = body.max_completion_tokens, "max_completion_tokens"
        asked, param = (body.max_tokens, "max_tokens") if asked is None else (asked, param)
        if asked == 0:
            raise bad_value(f"{param} is 0, expected at least 1", param)
        check_length(len(prompt), asked, service.max_seq_len, param if asked is not None else "messages")
        if asked is not None:
            self._settings["max_gen_len"] = asked
        output = OutputOptions(bool(body.logprobs), False, body.top_logprobs or 0)
        if body.has_beams:
            return await begin_search(service, [prompt], self._settings, body)
        return await service.submit([prompt], self._settings, output, self.n, body.cache_prompt is not False)

    def encode(self) -> list[int]:
        """The prompt's tokens. Raises ApiError."""
        body = self._body
        options: DialogOptions = {}
        if self._tools:
            options["tools"] = self._tools
        if body.chat_template_kwargs is not None:
            options["chat_template_kwargs"] = body.chat_template_kwargs
        return encode_dialog(self._service.llama.formatter, body.messages, options)

    async def read(self, running: Running) -> AsyncIterator[tuple[int, list[Delta], bool]]:
        """(answer, what is new in it, whether it is over) for each step."""
        async for new in running.answers.steps():
            for step in new:
                if running.answers.is_ended(step.row):
                    continue
                reader = running.readers[step.row]
                deltas = reader.push(step)
                is_over = step.finish_reason is not None
                if not is_over and self._body.parallel_tool_calls is False and reader.has_calls:
                    running.answers.end(step.row)  # it has the one call that it may have
                    is_over = True
                yield step.row, deltas, is_over
