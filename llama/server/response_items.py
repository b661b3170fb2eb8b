"""The items of a response and their events: messages, reasoning and calls, each begun, continued and ended in turn.

Knows deltas of an answer and how OpenAI's Responses protocol writes them; knows no request.
"""

import secrets
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from ..engine.sequence import Step
from ..tokenization.protocol import AnyTokenizer
from ..tokenization.tool_parser import ArgumentPiece, CallStart, ContentPiece, Delta, ReasoningPiece
from .choices import describe_logprobs
from .dialog import Running

Event = dict[str, Any]
TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}  # items of text, and the type of their one part
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ItemWriter:
    """Writes deltas as events of items, and keeps the items."""

    def __init__(self, tokenizer: AnyTokenizer, top_logprobs: int | None):
        """top_logprobs: how many of the likeliest tokens the logprobs have; None: no logprobs are wanted."""
        self.items: list[dict[str, Any]] = []
        self._tokenizer, self._top = tokenizer, top_logprobs
        self._waiting: list[dict[str, Any]] = []  # logprobs of tokens whose text is still held back
        self._kind = ""  # of the item that is open

    def write(self, step: Step, deltas: Sequence[Delta], was_reasoning: bool) -> Iterator[Event]:
        """The events of a step. was_reasoning: whether its token belongs to the reasoning."""
        is_stop = step.finish_reason == "stop" and step.token == step.stop
        if self._top is not None and not is_stop and not was_reasoning:
            self._waiting += describe_logprobs(self._tokenizer, [step], self._top)["content"]
        for delta in deltas:
            match delta:
                case ContentPiece(text):
                    yield from self._open("message", {"role": "assistant", "content": []})
                    logprobs, self._waiting = self._waiting, []
                    yield self._go_on(text, logprobs)
                case ReasoningPiece(text):
                    self._waiting = []
                    yield from self._open("reasoning", {"summary": [], "content": []})
                    yield self._go_on(text, [])
                case CallStart(_, identity, name):
                    self._waiting = []
                    yield from self._open("function_call", {"call_id": identity, "name": name, "arguments": ""})
                case ArgumentPiece(_, text):
                    self.items[-1]["arguments"] += text
                    yield {"type": "response.function_call_arguments.delta", **self._of_item(), "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        """The end of the answer; one that is empty has an empty message. status: of the item that is open."""
        if not self.items:
            yield from self._open("message", {"role": "assistant", "content": []})
        yield from self._close(status)

    def _open(self, kind: str, fields: dict[str, Any]) -> Iterator[Event]:
        """The beginning of an item, unless it is one of text that is open already."""
        if kind == self._kind and kind in TEXTS:
            return
        yield from self._close()
        self._kind = kind
        identity = PREFIXES[kind] + secrets.token_hex(16)
        self.items.append({"id": identity, "type": kind, "status": "in_progress", **fields})
        yield {"type": "response.output_item.added", **self._at(), "item": deepcopy(self.items[-1])}
        if kind in TEXTS:
            part: dict[str, Any] = {"type": TEXTS[kind], "text": ""}
            part |= {"annotations": [], "logprobs": []} if kind == "message" else {}
            self.items[-1]["content"].append(part)
            yield {"type": "response.content_part.added", **self._in_part(), "part": deepcopy(part)}

    def _go_on(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        """The text of the open item goes on."""
        (part,) = self.items[-1]["content"]
        part["text"] += text
        event = {"type": f"response.{TEXTS[self._kind]}.delta", **self._in_part(), "delta": text}
        if self._kind == "message":
            part["logprobs"] += logprobs
            event["logprobs"] = shorten_logprobs(logprobs)
        return event

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """The end of the open item, if there is one."""
        if not self._kind:
            return
        item = self.items[-1]
        item["status"] = status
        if self._kind in TEXTS:
            (part,) = item["content"]
            event = {"type": f"response.{TEXTS[self._kind]}.done", **self._in_part(), "text": part["text"]}
            if self._kind == "message":
                part["logprobs"] += self._waiting
                event["logprobs"] = shorten_logprobs(part["logprobs"])
            yield event
            yield {"type": "response.content_part.done", **self._in_part(), "part": part}
        else:
            yield {"type": "response.function_call_arguments.done", **self._of_item(), "arguments": item["arguments"]}
        yield {"type": "response.output_item.done", **self._at(), "item": item}
        self._kind, self._waiting = "", []

    def _at(self) -> Event:
        return {"output_index": len(self.items) - 1}

    def _of_item(self) -> Event:
        return {"item_id": self.items[-1]["id"], **self._at()}

    def _in_part(self) -> Event:
        return {**self._of_item(), "content_index": 0}


def shorten_logprobs(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logprobs as events have them: without bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [{"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]],
        }
        for one in logprobs
    ]


def describe_usage(running: Running) -> dict[str, Any]:
    """The count of tokens."""
    (reader,), prompt = running.readers, running.answers.prompt_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": running.answers.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": running.tokens,
        "output_tokens_details": {"reasoning_tokens": reader.reasoning_tokens},
        "total_tokens": prompt + running.tokens,
    }
