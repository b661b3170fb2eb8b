"""`complete --input`: reads prompts from a file of JSON lines, answers them in full batches, writes a record for each.

Records are in the order of the lines. Knows lines, batches and records; what survives a kill is `resumable_output`'s
job, generation `Llama.complete`'s.
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
from .._util.files import unreadable_error
from .._util.json_lines import parse_object
from .._util.ranks import is_main_process
from .._util.validate import is_integer
from ..engine.outputs import Completion, describe_completion
from ..engine.request_checks import check_room, check_token_ids
from ..errors import LlamaError, describe, pluralize, shorten
from ..generation import Llama
from ..parallel import broadcast_object, new_long_timeout_group, raise_together
from ..settings import NAMES, Options, Settings
from ..tokenization.chat_template import make_formatter
from .resumable_output import ResumableRecords, sibling_path

LINE_OPTIONS = (NAMES | {"n", "logprobs"}) - {"logits_processor"}
FOREIGN_OPTIONS = (Options.__annotations__.keys() | {"echo", "max_tokens", "max_new_tokens"}) - LINE_OPTIONS
RECORD_KEYS = {"line", "generation", "finish_reason", "tokens", "error"}
MISSPELT_SIMILARITY = 0.88  # a key that is as similar to an option counts as a misspelt one


@dataclass(frozen=True)
class LineRequest:
    """What a line asks for."""

    number: int  # of the line, from 1
    prompt_tokens: list[int]
    settings: Mapping[str, Any]  # of each of the n answers
    n: int
    logprobs: bool
    extra: Mapping[str, Any]  # the line's other keys, which its record repeats


class RequestReader:
    """Turns lines into requests, on the one rank that reads the file."""

    def __init__(self, llama: Llama, shared: Mapping[str, Any], seed: int, today: datetime):
        """shared: settings of lines that don't set them. today: the date that a chat template may write."""
        self._llama, self._shared, self._seed = llama, shared, seed
        self._formatter = make_formatter(llama.tokenizer, today)

    def read(self, number: int, line: bytes) -> LineRequest:
        """Raises LlamaError for a line that can't be answered."""
        fields = parse_object(line)
        options = {name: fields.pop(name) for name in LINE_OPTIONS & fields.keys()}
        prompt_tokens = self._pop_prompt(fields)
        for name in fields:
            check_extra_key(name)
        n, logprobs = options.pop("n", 1), options.pop("logprobs", False)
        params = self._llama.model.params
        if not is_integer(n, 1):
            raise LlamaError(f"n is {shorten(n)}, expected a whole number of at least 1")
        if n > params.max_batch_size:
            raise LlamaError(f"n is {n}, but max_batch_size is {params.max_batch_size}: raise --max_batch_size")
        if not isinstance(logprobs, bool):
            raise LlamaError(f"logprobs is {shorten(logprobs)}, expected true or false")
        if isinstance(bias := options.get("logit_bias"), dict):  # keys of JSON are texts
            options["logit_bias"] = {int(k) if re.fullmatch("[0-9]{1,9}", k) else k: v for k, v in bias.items()}
        settings = {**self._shared, **options}
        if settings.get("seed") is None:
            settings["seed"] = derive_seed(self._seed, number)
        check_token_ids([Settings(**settings)], 0, params.vocab_size)
        check_room(prompt_tokens, params.max_seq_len)
        return LineRequest(number, prompt_tokens, settings, n, logprobs, fields)

    def _pop_prompt(self, fields: dict[str, Any]) -> list[int]:
        """Remove the prompt or the messages from `fields`; returns their tokens."""
        if ("prompt" in fields) == ("messages" in fields):
            present = "both prompt and messages" if "prompt" in fields else "neither prompt nor messages"
            raise LlamaError(f"the line has {present}, expected one of them")
        if "messages" in fields:
            messages = fields.pop("messages")
            if not isinstance(messages, list):
                raise LlamaError(f"messages is {describe(messages)}, expected a list of them")
            return self._formatter.encode_dialog_prompt(messages)
        text = fields.pop("prompt")
        if not isinstance(text, str):
            raise LlamaError(f"prompt is {describe(text)}, expected a text")
        if not text:
            raise LlamaError("prompt is empty: give it at least one character")
        return self._llama.tokenizer.encode(text, bos=True, eos=False)


@lru_cache(maxsize=1024)
def check_extra_key(name: str) -> None:
    """Refuse a key that the record has itself, or that looks like an option and would have no effect."""
    if name in RECORD_KEYS:
        raise LlamaError(f"{name!r} is a name that the record has itself: call yours something else")
    plain = name.lower().replace("-", "_")
    if name in FOREIGN_OPTIONS or get_close_matches(plain, LINE_OPTIONS, 1, MISSPELT_SIMILARITY):
        raise LlamaError(f"{name!r} is no setting: known are {', '.join(sorted(LINE_OPTIONS))}")


def derive_seed(seed: int, number: int) -> int:
    """The seed of a line that sets none. It depends on the line's number, and not on its batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest(), "little")


class BatchFiles:
    """The input file, and the records that were written so far; on the one rank that reads and writes them."""

    count: int  # lines of the input that aren't empty
    part: ResumableRecords  # the records
    earlier: int  # records that earlier runs wrote

    def __init__(self, source: str, output: str, about: dict[str, Any], force: bool):
        """Raises LlamaError for files that can't be read or written, and for an output of another job."""
        target = Path(os.path.realpath(output))
        if Path(os.path.realpath(source)) in (target, sibling_path(target, "part"), sibling_path(target, "sorted")):
            raise LlamaError(f"--output {output} would write over the input: name another file")
        if Path(source).exists() and not Path(source).is_file():
            raise LlamaError(f"{source} is no file: expected one of JSON lines, which is read more than once")
        try:
            self._source = open(source, "rb")  # noqa: SIM115 (it stays open, so that replacing the file has no effect)
            digest = hashlib.file_digest(self._source, "sha256").hexdigest()
            self.count = sum(1 for _ in self._lines())
        except OSError as e:
            raise unreadable_error(Path(source), e) from e
        self.part = ResumableRecords(target, {"input": digest, **about}, {"today": datetime.now().isoformat()}, force)
        self.earlier = len(self.part.places)

    @property
    def remaining(self) -> int:
        """How many lines have no record yet."""
        return self.count - len(self.part.places)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, offset in bytes, line) of each line that isn't empty."""
        self._source.seek(0)
        offset = 0
        for number, line in enumerate(self._source, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)

    def iterate_batches(self, llama: Llama, shared: Mapping[str, Any], seed: int) -> Iterator[list[LineRequest]]:
        """The lines without a record, in batches of one n and of similar lengths, the longest first.

        A line that can't be answered gets its record here. Only offsets are kept in memory, so that the file may be
        larger than it. After a kill, the remaining lines are cut into the same batches as before.
        """
        reader = RequestReader(llama, shared, seed, datetime.fromisoformat(self.part.fixed["today"]))
        plan = []
        for number, offset, line in self._lines():
            if number in self.part.places:
                continue
            try:
                request = reader.read(number, line)
                plan.append((request.n, -len(request.prompt_tokens), number, offset))
            except LlamaError as e:
                self.part.add([{"line": number, "error": str(e)}])
        plan.sort()
        for n, lines in groupby(plan, key=lambda planned: planned[0]):
            while batch := list(islice(lines, llama.model.params.max_batch_size // n)):
                yield [reader.read(number, self._line_at(offset)) for _, _, number, offset in batch]

    def _line_at(self, offset: int) -> bytes:
        self._source.seek(offset)
        return self._source.readline()

    def summarize(self) -> str:
        before = f", {self.earlier} by earlier runs" if self.earlier else ""
        counts = f"{pluralize(len(self.part.places), 'line')} done, {pluralize(self.part.errors, 'error')}"
        return f"{self.part.output}: {counts}{before}"


def complete_batch(
    llama: Llama, batch: Sequence[LineRequest], speculation: Mapping[str, Any]
) -> list[list[Completion] | LlamaError]:
    """The n answers to each request, or its error. All ranks make the same calls, and get the same errors."""
    n, logprobs = batch[0].n, any(request.logprobs for request in batch)
    prompts, settings = [request.prompt_tokens for request in batch], [request.settings for request in batch]
    try:
        completions = llama.complete(prompts, logprobs=logprobs, n=n, rows=settings, **speculation)
    except LlamaError as e:
        if len(batch) == 1:
            return [e]
        # One by one, so that only the requests that are wrong have an error.
        return [answer for request in batch for answer in complete_batch(llama, [request], speculation)]
    return [completions[start : start + n] for start in range(0, len(completions), n)]


def make_record(llama: Llama, request: LineRequest, answers: list[Completion] | LlamaError) -> dict[str, Any]:
    """The line of the output for a line of the input. If n > 1, every value is a list of n."""
    if isinstance(answers, LlamaError):
        return {"line": request.number, "error": str(answers)}
    fields: list[dict[str, Any]] = []
    for completion in answers:
        shown = completion if request.logprobs else replace(completion, logprobs=None)
        fields.append({"generation": completion.text, **describe_completion(shown, llama.tokenizer)})
    names = dict.fromkeys(name for answer in fields for name in answer)
    values = fields[0] if request.n == 1 else {name: [answer.get(name) for answer in fields] for name in names}
    return {"line": request.number, **request.extra, **values}


def complete_remaining(
    llama: Llama,
    files: BatchFiles | None,
    shared: Mapping[str, Any],
    seed: int,
    speculation: Mapping[str, Any],
    ranks: ProcessGroup | None,
) -> None:
    """Write a record for every line without one. files: None on the ranks that get their batches from rank 0."""
    batches = files.iterate_batches(llama, shared, seed) if files else iter(())
    tokens, seconds = 0, 0.0
    total, earlier = (files.count, files.earlier) if files else (0, 0)
    with progress_bar("completing", total, " lines", done=earlier) as bar:
        while True:
            with raise_together(ranks):
                batch = next(batches, None)
            if (batch := broadcast_object(batch, ranks)) is None:
                return
            started = time.monotonic()
            answers = complete_batch(llama, batch, speculation)
            seconds += time.monotonic() - started
            tokens += sum(len(one.tokens) for group in answers if isinstance(group, list) for one in group)
            bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s", refresh=False)
            with raise_together(ranks):
                if files:
                    files.part.add([make_record(llama, *pair) for pair in zip(batch, answers, strict=True)])
                    bar.update(len(files.part.places) - bar.n)


def complete_file(
    source: str,
    output: str,
    shared: Mapping[str, Any],
    seed: int,
    about: Mapping[str, Any],
    force: bool,
    build: Callable[[], Llama],
    speculation: Mapping[str, Any] | None = None,
) -> str | None:
    """Answer every line of `source` that has no record yet; then write `output`. Called on all ranks alike.

    shared: settings of lines that don't set them. seed: what the seeds of lines without one are derived from. about:
    what else the text depends on, such as the checkpoint's name. force: start over, whatever there is. build: gives the
    model; called only if a line is to be answered. speculation: how to propose tokens. Returns a summary on the rank
    that talks to the user, None on others. Raises LlamaError on all ranks.
    """
    ranks = new_long_timeout_group()  # rank 0 may read for a long time while the others wait
    files = None
    with raise_together(ranks):
        Settings(**shared)
        if is_main_process():
            files = BatchFiles(source, output, {**about, **shared, "seed": seed}, force)
    if broadcast_object(files.remaining if files else 0, ranks):
        complete_remaining(build(), files, shared, seed, speculation or {}, ranks)
    with raise_together(ranks):
        if files:
            files.part.finish()
    return files.summarize() if files else None
