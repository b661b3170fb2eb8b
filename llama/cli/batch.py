"""`complete --input`: prompts from a file of JSON lines, answered in full batches; a record a line, in the same order.

Knows lines, batches and records; of what survives a kill, and of how text is generated, it only calls what does.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from .._util.console import progress_bar
from .._util.files import unreadable
from .._util.json_lines import parsed
from .._util.ranks import is_main_process
from .._util.validate import is_integer
from ..engine.outputs import Completion, details
from ..engine.request_checks import check_room, check_token_ids
from ..errors import LlamaError, counted, kind_of, shortened
from ..generation import Llama
from ..parallel import broadcast_object, patient_group, together
from ..settings import NAMES, Settings, Speculation, Wanted
from ..tokenization.chat_template import formatter
from .resumable_output import Part, beside

OPTIONS = (NAMES | {"n", "logprobs"}) - {"logits_processor"}  # that a line may have
FOREIGN = (Wanted.__annotations__.keys() | {"echo", "max_tokens", "max_new_tokens"}) - OPTIONS  # that it seems to have
OF_RECORDS = {"line", "generation", "finish_reason", "tokens", "error"}
ALIKE = 0.88  # from here on a key is a misspelt option


@dataclass(frozen=True)
class Job:
    """A line: its number, the prompt's tokens, the settings of its n rows, and the keys that are only copied."""

    number: int
    prompt: list[int]
    settings: Mapping[str, Any]
    n: int
    logprobs: bool
    own: Mapping[str, Any]


class RequestReader:
    """What lines ask for, on the one rank that reads them. shared: settings of lines that have none of their own."""

    def __init__(self, llama: Llama, shared: Mapping[str, Any], seed: int, today: datetime):
        self._llama, self._shared, self._seed = llama, shared, seed
        self._formatter = formatter(llama.tokenizer, today)

    def job(self, number: int, line: bytes) -> Job:
        """Raises LlamaError for a line that can't be answered."""
        given = parsed(line)
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        prompt = self._prompt(given)
        for name in given:
            check_copied(name)
        n, logprobs = options.pop("n", 1), options.pop("logprobs", False)
        params = self._llama.model.params
        if not is_integer(n, 1):
            raise LlamaError(f"n is {shortened(n)}, expected a whole number of at least 1")
        if n > params.max_batch_size:
            raise LlamaError(f"n is {n}, but max_batch_size is {params.max_batch_size}: raise --max_batch_size")
        if not isinstance(logprobs, bool):
            raise LlamaError(f"logprobs is {shortened(logprobs)}, expected true or false")
        if isinstance(bias := options.get("logit_bias"), dict):  # JSON's keys are texts
            options["logit_bias"] = {int(k) if re.fullmatch("[0-9]{1,9}", k) else k: v for k, v in bias.items()}
        settings = {**self._shared, **options}
        if settings.get("seed") is None:
            settings["seed"] = seed_of(self._seed, number)
        check_token_ids([Settings(**settings)], 0, params.vocab_size)
        check_room(prompt, params.max_seq_len)
        return Job(number, prompt, settings, n, logprobs, given)

    def _prompt(self, given: dict[str, Any]) -> list[int]:
        """Takes it out of `given`."""
        if ("prompt" in given) == ("messages" in given):
            found = "both prompt and messages" if "prompt" in given else "neither prompt nor messages"
            raise LlamaError(f"the line has {found}, expected one of them")
        if "messages" in given:
            messages = given.pop("messages")
            if not isinstance(messages, list):
                raise LlamaError(f"messages is {kind_of(messages)}, expected a list of them")
            return self._formatter.encode_dialog_prompt(messages)
        text = given.pop("prompt")
        if not isinstance(text, str):
            raise LlamaError(f"prompt is {kind_of(text)}, expected a text")
        if not text:
            raise LlamaError("prompt is empty: give it at least one character")
        return self._llama.tokenizer.encode(text, bos=True, eos=False)


@lru_cache(maxsize=1024)
def check_copied(name: str) -> None:
    """Refuse a key that would be lost, or silently not do what it says."""
    if name in OF_RECORDS:
        raise LlamaError(f"{name!r} is a name that the record has itself: call yours something else")
    plain = name.lower().replace("-", "_")
    if name in FOREIGN or get_close_matches(plain, OPTIONS, 1, ALIKE):
        raise LlamaError(f"{name!r} is no setting: known are {', '.join(sorted(OPTIONS))}")


def seed_of(seed: int, number: int) -> int:
    """The seed of a line that has none: whatever its batch is, and whenever it is run."""
    return int.from_bytes(hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest(), "little")


class Files:
    """The input, and the records that there are: on the one rank that reads and writes."""

    def __init__(self, source: str, output: str, about: dict[str, Any], force: bool):
        """Raises LlamaError for what can't be read or written, or was begun otherwise."""
        target = Path(os.path.realpath(output))
        if Path(os.path.realpath(source)) in (target, beside(target, "part"), beside(target, "sorted")):
            raise LlamaError(f"--output {output} would write over the input: name another file")
        if Path(source).exists() and not Path(source).is_file():
            raise LlamaError(f"{source} is no file: expected one of JSON lines, which is read more than once")
        try:
            self._source = open(source, "rb")  # noqa: SIM115 (it stays open: what replaces the file is another one)
            digest = hashlib.file_digest(self._source, "sha256").hexdigest()
            self.count = sum(1 for _ in self._lines())
        except OSError as e:
            raise unreadable(Path(source), e) from e
        self.part = Part(target, {"input": digest, **about}, {"today": datetime.now().isoformat()}, force)
        self.earlier = len(self.part.places)

    @property
    def left(self) -> int:
        """Lines that lack a record."""
        return self.count - len(self.part.places)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, offset, line) of those that aren't empty."""
        self._source.seek(0)
        offset = 0
        for number, line in enumerate(self._source, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)

    def batches(self, llama: Llama, shared: Mapping[str, Any], seed: int) -> Iterator[list[Job]]:
        """The lines that lack a record, of one n and nearly one length in each batch; bad ones get theirs here.

        The longest come first, and only places are remembered, so that lines may be more than memory holds. What is
        left after a kill is cut into the batches that it would have been cut into.
        """
        reader = RequestReader(llama, shared, seed, datetime.fromisoformat(self.part.fixed["today"]))
        plan = []
        for number, offset, line in self._lines():
            if number in self.part.places:
                continue
            try:
                job = reader.job(number, line)
                plan.append((job.n, -len(job.prompt), number, offset))
            except LlamaError as e:
                self.part.add([{"line": number, "error": str(e)}])
        plan.sort()
        for n, alike in groupby(plan, key=lambda planned: planned[0]):
            while batch := list(islice(alike, llama.model.params.max_batch_size // n)):
                yield [reader.job(number, self._line_at(offset)) for _, _, number, offset in batch]

    def _line_at(self, offset: int) -> bytes:
        self._source.seek(offset)
        return self._source.readline()

    def summary(self) -> str:
        before = f", {self.earlier} by earlier runs" if self.earlier else ""
        counts = f"{counted(len(self.part.places), 'line')} done, {counted(self.part.errors, 'error')}"
        return f"{self.part.output}: {counts}{before}"


def answers(llama: Llama, jobs: Sequence[Job], speculation: Speculation) -> list[list[Completion] | LlamaError]:
    """n answers to each, or why there are none. All ranks make the same calls, and get the same errors."""
    n, logprobs = jobs[0].n, any(job.logprobs for job in jobs)
    prompts, settings = [job.prompt for job in jobs], [job.settings for job in jobs]
    try:
        found = llama.complete(prompts, logprobs=logprobs, n=n, rows=settings, **speculation)  # type: ignore[arg-type]
    except LlamaError as e:
        if len(jobs) == 1:
            return [e]
        return [one for job in jobs for one in answers(llama, [job], speculation)]  # alone, the others have no error
    return [found[start : start + n] for start in range(0, len(found), n)]


def record(llama: Llama, job: Job, found: list[Completion] | LlamaError) -> dict[str, Any]:
    """What the output says of a line; of n > 1 answers, everything is a list of n."""
    if isinstance(found, LlamaError):
        return {"line": job.number, "error": str(found)}
    told: list[dict[str, Any]] = []
    for one in found:
        kept = one if job.logprobs else replace(one, logprobs=None)
        told.append({"generation": one.text, **details(kept, llama.tokenizer)})
    names = dict.fromkeys(name for one in told for name in one)
    every = told[0] if job.n == 1 else {name: [one.get(name) for one in told] for name in names}
    return {"line": job.number, **job.own, **every}


def answer_all(
    llama: Llama,
    files: Files | None,
    shared: Mapping[str, Any],
    seed: int,
    speculation: Speculation,
    ranks: ProcessGroup | None,
) -> None:
    """A record to every line that lacks one. files: on the rank that has them, which tells the others what to do."""
    work = files.batches(llama, shared, seed) if files else iter(())
    tokens, seconds = 0, 0.0
    total, earlier = (files.count, files.earlier) if files else (0, 0)
    with progress_bar("completing", total, " lines", done=earlier) as bar:
        while True:
            with together(ranks):
                batch = next(work, None)
            if (batch := broadcast_object(batch, ranks)) is None:
                return
            begun = time.monotonic()
            found = answers(llama, batch, speculation)
            seconds += time.monotonic() - begun
            tokens += sum(len(one.tokens) for group in found if isinstance(group, list) for one in group)
            bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s", refresh=False)
            with together(ranks):
                if files:
                    files.part.add([record(llama, *pair) for pair in zip(batch, found, strict=True)])
                    bar.update(len(files.part.places) - bar.n)


def complete_file(
    source: str,
    output: str,
    shared: Mapping[str, Any],
    seed: int,
    about: Mapping[str, Any],
    force: bool,
    build: Callable[[], Llama],
    speculation: Speculation | None = None,
) -> str | None:
    """Answer every line of `source` that has no record yet; then `output` has them all. Called on all ranks alike.

    shared: settings of lines that have none of their own. seed: what lines without a seed have theirs from. about: what
    else makes the text what it is, such as the checkpoint's name. build: gives the model, where one is needed.
    speculation: how tokens are proposed. Returns, on the rank that talks to the user, how it went. Raises LlamaError,
    on all ranks.
    """
    ranks = patient_group()  # one of them may read for long while the others wait
    files = None
    with together(ranks):
        Settings(**shared)
        if is_main_process():
            files = Files(source, output, {**about, **shared, "seed": seed}, force)
    if broadcast_object(files.left if files else 0, ranks):
        answer_all(build(), files, shared, seed, speculation or {}, ranks)
    with together(ranks):
        if files:
            files.part.finish()
    return files.summary() if files else None
