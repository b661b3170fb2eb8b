"""Answers that are searched for: a beam search in a thread, whose results come as the steps of ordinary answers do.

Knows the search and the event loop; knows no protocol.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..engine.beam_search import Beams, search_beams
from ..engine.ending import Ending
from ..engine.outputs import Completion
from ..engine.request_checks import check_budget, check_prompts, check_token_ids
from ..engine.sequence import Step
from ..errors import LlamaError
from ..settings import Settings
from .errors import failed, too_late
from .protocol import Sampling
from .service import Service


class Search:
    """A search that is under way. A context, at whose end it is ended. Used as `service.Answers` is."""

    def __init__(self, service: Service, prompts: Sequence[list[int]], beams: Beams, settings: Settings):
        self.prompts = [prompt for prompt in prompts for _ in range(beams.num_return_sequences)]  # of each answer
        self.prompt_tokens, self.cached_tokens = sum(map(len, prompts)), 0
        self._service, self._ending = service, Ending()
        self._search = functools.partial(
            search_beams, service.llama.engine, prompts, beams, settings, ending=self._ending
        )

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.end(self._service.llama.engine)

    def end(self, row: int) -> None:
        """Nothing: all steps come at once."""

    def is_ended(self, row: int) -> bool:
        return False

    async def steps(self) -> AsyncIterator[list[Step]]:
        """All steps, once the search is over. Raises ApiError where it fails, or for a timeout."""
        started, seconds = time.monotonic(), self._service.options.timeout
        try:
            async with asyncio.timeout(seconds):
                found = await asyncio.get_running_loop().run_in_executor(self._service.searches, self._search)
        except TimeoutError:
            raise too_late(seconds) from None
        except LlamaError as e:
            raise failed(e) from e
        steps = [step for row, completion in enumerate(found) for step in write_steps(row, completion)]
        metrics = self._service.metrics
        metrics.note_tokens(len(steps), time.monotonic() - started, 0)
        metrics.note_prompts(self.prompt_tokens, 0)
        yield steps


async def begin_search(
    service: Service, prompts: Sequence[list[int]], settings: Mapping[str, Any], body: Sampling
) -> Search:
    """A search for n answers to each prompt. Raises ApiError, as the service does, for what can't be searched for."""
    assert body.num_beams is not None
    beams = Beams(body.num_beams, num_return_sequences=body.n or 1)
    return await service.call(make_search, service, prompts, beams, {**service.options.defaults, **settings})


def make_search(service: Service, prompts: Sequence[list[int]], beams: Beams, shared: Mapping[str, Any]) -> Search:
    """A search that will not be refused. Raises LlamaError."""
    params, engine = service.llama.model.params, service.llama.engine
    settings = beams.check(shared, {})
    assert settings is not None
    check_prompts(prompts, params)
    check_token_ids([settings], 0, params.vocab_size)
    check_budget(prompts, [settings] * len(prompts), params.max_seq_len, engine.cache_tokens)
    return Search(service, prompts, beams, settings)


def write_steps(row: int, found: Completion) -> list[Step]:
    """An answer as steps, the last of which has its text and its end."""
    tokens = [*found.tokens, *([found.stop] if isinstance(found.stop, int) else [])]
    steps = [Step(row, token, "", length=min(i + 1, len(found.tokens))) for i, token in enumerate(tokens)]
    if steps:
        steps[-1] = replace(steps[-1], text=found.text, finish_reason=found.finish_reason, stop=found.stop)
    return steps
