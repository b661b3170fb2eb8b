"""What a model writes as the API's messages have it: content, reasoning and calls, in deltas and as a whole.

Knows steps and forms of calls; knows no endpoint.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from ..engine.sequence import Step
from ..tokenization.protocol import AnyTokenizer
from ..tokenization.texts import read_content
from ..tokenization.tool_calls import ToolForm
from ..tokenization.tool_parser import (
    ArgumentPiece,
    CallStart,
    ContentPiece,
    Delta,
    MessageParser,
    ReasoningPiece,
    describe_message,
    join_deltas,
)

DECIDING_TOKENS = 32  # of the prompt's end, which tell whether the answer begins inside of reasoning


class AnswerReader:
    """Reads one answer as it comes."""

    def __init__(self, tokenizer: AnyTokenizer, form: ToolForm, with_tools: bool, prompt: Sequence[int]):
        in_reasoning = form.opens_reasoning(tokenizer.decode(prompt[-DECIDING_TOKENS:]))
        self._tokenizer = tokenizer
        self._parser = MessageParser(form, with_tools, in_reasoning=in_reasoning, random=Random())
        self._written, self._shown = "", 0
        self._deltas: list[Delta] = []
        self.steps: list[Step] = []
        self.was_reasoning = False  # whether the last token belongs to the reasoning
        self.reasoning_tokens = 0

    def push(self, step: Step) -> list[Delta]:
        """What is known with this step."""
        self.steps.append(step)
        self.was_reasoning = self._parser.is_reasoning
        self.reasoning_tokens += self.was_reasoning
        self._written += step.text
        content = read_content(self._tokenizer, self._written)
        new, self._shown = content[self._shown :], max(self._shown, len(content))
        deltas = self._parser.push(new)
        if step.finish_reason is not None:
            deltas += self._parser.flush()
        self._deltas += deltas
        return deltas

    @property
    def has_calls(self) -> bool:
        return any(isinstance(delta, CallStart) for delta in self._deltas)

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop", "length" or "tool_calls"."""
        reason = self.steps[-1].finish_reason if self.steps else "length"
        return "tool_calls" if self.has_calls and reason != "length" else reason or "stop"

    @property
    def message(self) -> dict[str, Any]:
        """The whole message. Beside calls there may be no content."""
        described: dict[str, Any] = {**describe_message(join_deltas(self._deltas))}
        if "tool_calls" in described and not described["content"]:
            described["content"] = None
        return {**described, "refusal": None}


def write_deltas(deltas: Sequence[Delta]) -> Iterator[dict[str, Any]]:
    """Deltas as chunks of a stream have them."""
    for delta in deltas:
        match delta:
            case ContentPiece(text):
                yield {"content": text}
            case ReasoningPiece(text):
                yield {"reasoning_content": text}
            case CallStart(index, identity, name):
                function = {"name": name, "arguments": ""}
                yield {"tool_calls": [{"index": index, "id": identity, "type": "function", "function": function}]}
            case ArgumentPiece(index, text):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
