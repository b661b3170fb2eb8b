"""POST /v1/completions: texts or token ids in, what follows them out, whole or in chunks.

Knows the endpoint's fields; knows no socket.
"""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ..engine.sequence import OutputOptions, Step
from ..tokenization.texts import decode_token, name_tokens
from .beams import Search, begin_search
from .choices import TokenPlacer, count_usage
from .errors import bad_value
from .protocol import CompletionBody
from .sampling_options import check_length, count_choices, read_settings
from .service import Answers, Service


class Completion:
    """One request to the endpoint."""

    def __init__(self, service: Service, body: CompletionBody):
        """Raises ApiError for what can't be asked."""
        service.check_model(body.model)
        self._service, self._body = service, body
        self._tokenizer = service.llama.tokenizer
        self._settings = read_settings(body)
        self._hidden = 0  # echoed tokens that the tokenizer has put before a text
        if body.echo and is_text(body.prompt):
            self._hidden = len(self._tokenizer.encode("", bos=True, eos=False))
        self._n, self._generated = body.n or 1, count_choices(body.n, body.best_of)
        if body.best_of is not None and body.best_of > self._n and body.stream:
            raise bad_value("best_of can't be streamed", "best_of")
        if body.max_tokens == 0 and not body.echo:
            raise bad_value("max_tokens is 0, which goes with echo: true", "max_tokens")
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.options.model,
        }

    @property
    def choices(self) -> int:
        """Answers that are worked on, to all prompts together."""
        prompt = self._body.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return (len(prompt) if several else 1) * max(self._generated, self._body.num_beams or 1)

    @property
    def _multiplier(self) -> str:
        """The field that asks for so many answers."""
        if self._body.has_beams:
            return "num_beams"
        if self._generated > self._n:
            return "best_of"
        return "n" if self._n > 1 else "prompt"

    async def _begin(self) -> Answers | Search:
        body, service = self._body, self._service
        prompts = await service.call(encode_prompts, service, body.prompt)
        most = 16 if body.max_tokens is None else body.max_tokens  # the API's default
        for prompt in prompts:
            check_length(len(prompt), 1 if body.max_tokens is None else most, service.max_seq_len, "prompt")
        self._settings["max_gen_len"] = max(most, 1)
        if body.has_beams:
            return await begin_search(service, prompts, self._settings, body)
        output = OutputOptions(
            body.logprobs is not None or body.best_of is not None, bool(body.echo), body.logprobs or 0
        )
        return await service.submit(prompts, self._settings, output, self._generated, body.cache_prompt is not False)

    async def complete(self) -> dict[str, Any]:
        """The whole answers."""
        with self._service.admit(self.choices, self._multiplier), await self._begin() as answers:
            steps: list[list[Step]] = [[] for _ in answers.prompts]
            async for new in answers.steps():
                for step in new:
                    is_hidden = len(steps[step.row]) < self._hidden
                    steps[step.row].append(replace(step, text="") if is_hidden else step)
            lengths = [len(prompt) if self._body.echo else 0 for prompt in answers.prompts]
            usage = count_usage(answers, sum(map(len, steps)) - sum(lengths))
        if self._body.max_tokens == 0:
            steps = [own[:length] for own, length in zip(steps, lengths, strict=True)]
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        kept = self._select(steps, lengths)
        choices = [
            self._describe_choice(i, *pair, answers.prompts[i // self._n * self._generated])
            for i, pair in enumerate(kept)
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def _select(self, steps: list[list[Step]], lengths: list[int]) -> list[tuple[list[Step], int]]:
        """The steps and echoed tokens of the answers to return: of each prompt's, the n likeliest if there are more."""
        pairs = list(zip(steps, lengths, strict=True))
        groups = [pairs[i : i + self._generated] for i in range(0, len(pairs), self._generated)]
        return [pair for group in groups for pair in sorted(group, key=mean_negative_logprob)[: self._n]]

    def _place(self, prompt: Sequence[int], echoed: int) -> TokenPlacer:
        return TokenPlacer(self._tokenizer, prompt, echoed, self._hidden)

    def _describe_choice(self, index: int, steps: list[Step], echoed: int, prompt: Sequence[int]) -> dict[str, Any]:
        reason = steps[-1].finish_reason if steps and steps[-1].finish_reason else "length"
        logprobs = None
        if self._body.logprobs is not None:
            placer = self._place(prompt, echoed)
            logprobs = self._describe_logprobs([pair for step in steps for pair in placer.push(step)], bool(echoed))
        text = "".join(step.text for step in steps)
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _describe_logprobs(self, placed: Sequence[tuple[Step, int]], has_first: bool) -> dict[str, Any]:
        """The logprobs of a choice, or of a part of it. has_first: whether nothing predicts the first."""
        tokens = [decode_token(self._tokenizer, step.token) for step, _ in placed]
        values: list[float | None] = [step.logprob for step, _ in placed]
        tops: list[Any] = [self._name_best(step) for step, _ in placed]
        if has_first and values:
            values[0] = tops[0] = None
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": [at for _, at in placed],
        }

    def _name_best(self, step: Step) -> dict[str, float]:
        """The likeliest tokens in a step's place, and its own, whose name is always its bare text."""
        others = [pair for pair in step.top_logprobs or () if pair[0] != step.token]
        named = name_tokens(self._tokenizer, [(step.token, step.logprob or 0.0), *others])
        return dict(sorted(named.items(), key=lambda pair: -pair[1]))

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answers in chunks, and the usage."""
        body = self._body
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        tail = {"usage": None} if with_usage else {}
        with self._service.admit(self.choices, self._multiplier), await self._begin() as answers:
            count = 0
            left = [len(prompt) if body.echo else 0 for prompt in answers.prompts]  # echoed tokens to come
            placers = [self._place(*pair) for pair in zip(answers.prompts, left, strict=True)]
            firsts, hidden = [bool(body.echo)] * len(left), [self._hidden] * len(left)
            async for new in answers.steps():
                for step in new:
                    row, echoes = step.row, left[step.row] > 0
                    left[row] -= echoes
                    if body.max_tokens == 0 and not echoes:
                        continue
                    count += not echoes
                    logprobs, text = None, step.text * (hidden[row] == 0)
                    if body.logprobs is not None and (placed := placers[row].push(step)):
                        logprobs = self._describe_logprobs(placed, firsts[row])
                    firsts[row], hidden[row] = False, max(hidden[row] - 1, 0)
                    reason = "length" if body.max_tokens == 0 and left[row] == 0 else step.finish_reason
                    choice = {
                        "index": row,
                        "text": text,
                        "finish_reason": reason,
                        "logprobs": logprobs,
                    }
                    yield {**self._head, "choices": [choice], **tail}
            if with_usage:
                yield {**self._head, "choices": [], "usage": count_usage(answers, count)}


def mean_negative_logprob(answer: tuple[list[Step], int]) -> float:
    steps, echoed = answer
    logprobs = [step.logprob or 0.0 for step in steps[echoed:]]
    return -sum(logprobs) / max(len(logprobs), 1)


def is_text(prompt: Any) -> bool:
    """Whether a prompt is a text or texts, and not ids."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))


def encode_prompts(service: Service, prompt: Any, param: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt: a text, texts, ids, or lists of ids. param: its field. Raises ApiError."""
    if prompt == [] or prompt == "" or (isinstance(prompt, list) and any(one in ("", []) for one in prompt)):
        raise bad_value(f"{param} is empty, or has an empty one", param)
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    tokenizer = service.llama.tokenizer
    return [tokenizer.encode(p, bos=True, eos=False) if isinstance(p, str) else list(p) for p in prompts]
