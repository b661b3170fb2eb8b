"""`complete --input`: reads prompts from a file of JSON lines, has them answered, and writes a record for each.

Records are in the order of the lines. Knows lines, requests and records; what survives a kill is `resumable_output`'s
job, generation the engine's.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from .._util.console import progress_bar
from .._util.files import open_file, unreadable_error
from .._util.json_lines import parse_object
from .._util.ranks import is_main_process, new_long_timeout_group
from .._util.validate import is_integer, suggest
from ..engine.outputs import Completion, describe_completion, make_completion
from ..engine.rank_groups import leaders_group
from ..engine.request import raise_failures
from ..engine.request_checks import check_room, check_token_ids
from ..engine.sequence import OutputOptions, Sequence, Step
from ..engine.sequence_maker import CallOptions
from ..errors import LlamaError, describe, pluralize, shorten
from ..generation import Llama
from ..parallel import broadcast_object, is_group_leader, raise_together
from ..settings import CALL_OPTIONS, NAMES, Settings
from ..tokenization.chat_template import find_variables, make_formatter
from ..tokenization.messages import DIALOG_OPTIONS
from ..tokenization.texts import read_content
from .resumable_output import ResumableRecords, sibling_path

LINE_OPTIONS = (NAMES | {"n", "logprobs"}) - {"logits_processor"}
FOREIGN_OPTIONS = (NAMES | CALL_OPTIONS | {"echo", "max_tokens", "max_new_tokens"}) - LINE_OPTIONS
RECORD_KEYS = {"line", "generation", "finish_reason", "tokens", "error"}
T = TypeVar("T")
LINES_PER_ROW = 2  # lines under way for each row of a pass, so that one is there whenever a row is free
STEPS_BETWEEN_EXCHANGES = 16  # steps of the engine after which groups of ranks exchange lines and records
MISSPELT_SIMILARITY = 0.88  # a key that is as similar to an option counts as a misspelt one


@dataclass(frozen=True)
class LineRequest:
    """What a line asks for."""

    number: int  # of the line, from 1
    prompt_tokens: list[int]
    is_dialog: bool
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
        is_dialog = "messages" in fields
        prompt_tokens = self._pop_prompt(fields)
        for name in fields:
            check_extra_key(name)
        n, logprobs = options.pop("n", 1), options.pop("logprobs", False)
        params = self._llama.model.params
        if not is_integer(n, 1):
            raise LlamaError(f"n is {shorten(n)}, expected a whole number of at least 1")
        if not isinstance(logprobs, bool):
            raise LlamaError(f"logprobs is {shorten(logprobs)}, expected true or false")
        if isinstance(bias := options.get("logit_bias"), dict):  # keys of JSON are texts
            options["logit_bias"] = {int(k) if re.fullmatch("[0-9]{1,9}", k) else k: v for k, v in bias.items()}
        settings = {**self._shared, **options}
        if settings.get("seed") is None:
            settings["seed"] = derive_seed(self._seed, number)
        check_token_ids([Settings(**settings)], 0, params.vocab_size)
        check_room(prompt_tokens, params.max_seq_len)
        return LineRequest(number, prompt_tokens, is_dialog, settings, n, logprobs, fields)

    def _pop_prompt(self, fields: dict[str, Any]) -> list[int]:
        """Remove the prompt or the messages from `fields`; returns their tokens."""
        if ("prompt" in fields) == ("messages" in fields):
            present = "both prompt and messages" if "prompt" in fields else "neither prompt nor messages"
            raise LlamaError(f"the line has {present}, expected one of them")
        names = DIALOG_OPTIONS | (find_variables(self._formatter) if "messages" in fields else frozenset())
        asked = {name: fields.pop(name) for name in names & fields.keys()}
        if "messages" in fields:
            messages = fields.pop("messages")
            if not isinstance(messages, list):
                raise LlamaError(f"messages is {describe(messages)}, expected a list of them")
            return self._formatter.encode_dialog_prompt(messages, **asked)
        if asked:
            raise LlamaError(f"{min(asked)} goes with messages, and the line has a prompt")
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
        raise LlamaError(f"{shorten(name)} is a name that the record has itself: call yours something else")
    plain = name.lower().replace("-", "_")
    if name in FOREIGN_OPTIONS or get_close_matches(plain, LINE_OPTIONS, 1, MISSPELT_SIMILARITY):
        known = ", ".join(sorted(LINE_OPTIONS))
        raise LlamaError(f"{shorten(name)} is no setting: known are {known}{suggest(plain, LINE_OPTIONS)}")
    if get_close_matches(plain, DIALOG_OPTIONS, 1, MISSPELT_SIMILARITY):
        known = ", ".join(sorted(DIALOG_OPTIONS))
        raise LlamaError(f"{shorten(name)} is no option of a dialog: known are {known}{suggest(plain, DIALOG_OPTIONS)}")


def derive_seed(seed: int, number: int) -> int:
    """The seed of a line that sets none. It depends on the line's number, and not on its batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest(), "little")


class BatchFiles:
    """The input file, and the records that were written so far; on the one rank that reads and writes them."""

    count: int  # lines of the input that aren't empty
    records: ResumableRecords
    earlier: int  # records that earlier runs wrote

    def __init__(self, source: str, output: str, about: dict[str, Any], force: bool):
        """Raises LlamaError for files that can't be read or written, and for an output of another job."""
        target = Path(os.path.realpath(output))
        if Path(os.path.realpath(source)) in (target, sibling_path(target, "part"), sibling_path(target, "sorted")):
            raise LlamaError(f"--output {output} would write over the input: name another file")
        if Path(source).exists() and not Path(source).is_file():
            raise LlamaError(f"{source} is no file: expected one of JSON lines, which is read more than once")
        try:
            self._source = open_file(source)  # it stays open, so that replacing the file has no effect
            digest = hashlib.file_digest(self._source, "sha256").hexdigest()
            self.count = sum(1 for _ in self._lines())
        except OSError as e:
            raise unreadable_error(Path(source), e) from e
        self.records = ResumableRecords(
            target, {"input": digest, **about}, {"today": datetime.now().isoformat()}, force
        )
        self.earlier = len(self.records.places)

    @property
    def remaining(self) -> int:
        """How many lines have no record yet."""
        return self.count - len(self.records.places)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of each line that isn't empty."""
        self._source.seek(0)
        for number, line in enumerate(self._source, start=1):
            if line.strip():
                yield number, line

    def read_requests(self, llama: Llama, shared: Mapping[str, Any], seed: int) -> Iterator[LineRequest]:
        """The lines without a record, in their order. A line that can't be answered gets its record here.

        The file may be larger than the memory.
        """
        reader = RequestReader(llama, shared, seed, datetime.fromisoformat(self.records.fixed["today"]))
        for number, line in self._lines():
            if number in self.records.places:
                continue
            try:
                yield reader.read(number, line)
            except LlamaError as e:
                self.records.add([{"line": number, "error": str(e)}])

    def summarize(self) -> str:
        before = f", {self.earlier} by earlier runs" if self.earlier else ""
        counts = f"{pluralize(len(self.records.places), 'line')} done, {pluralize(self.records.errors, 'error')}"
        return f"{self.records.output}: {counts}{before}"


class RunningLine:
    """A line whose n answers are under way."""

    def __init__(self, llama: Llama, line: LineRequest, speculation: Mapping[str, Any]):
        """Raises LlamaError for a line that can't be answered."""
        self.line = line
        options = CallOptions(OutputOptions(line.logprobs), line.n, **speculation, reuse=True, is_drained=True)
        self._requests = llama.engine.make_requests([line.prompt_tokens], line.settings, None, options)
        self._steps: list[list[Step]] = [[] for _ in self._requests]

    @property
    def sequences(self) -> list[Sequence]:
        return [request.sequence for request in self._requests]

    def is_over(self) -> bool:
        """Whether all answers are there; takes their steps so far."""
        for request, steps in zip(self._requests, self._steps, strict=True):
            steps += request.take()
        return all(request.is_over for request in self._requests)

    def answers(self) -> list[Completion] | LlamaError:
        try:
            raise_failures(self.sequences)
        except LlamaError as e:
            return e
        return [make_completion(*pair) for pair in zip(self.sequences, self._steps, strict=True)]


def make_record(llama: Llama, request: LineRequest, answers: list[Completion] | LlamaError) -> dict[str, Any]:
    """The line of the output for a line of the input. If n > 1, every value is a list of n."""
    if isinstance(answers, LlamaError):
        return {"line": request.number, "error": str(answers)}
    fields: list[dict[str, Any]] = []
    for completion in answers:
        shown = completion if request.logprobs else replace(completion, logprobs=None)
        text = read_content(llama.tokenizer, completion.text) if request.is_dialog else completion.text
        fields.append({"generation": text, **describe_completion(shown, llama.tokenizer)})
    names = dict.fromkeys(name for answer in fields for name in answer)
    values = fields[0] if request.n == 1 else {name: [answer.get(name) for answer in fields] for name in names}
    return {"line": request.number, **request.extra, **values}


def complete_remaining(
    llama: Llama,
    files: BatchFiles | None,
    shared: Mapping[str, Any],
    seed: int,
    speculation: Mapping[str, Any],
) -> None:
    """Write a record for every line without one. files: None on all ranks but the first. Called on all ranks.

    Of each group of ranks that share a model the first one answers its part of the lines, and the others follow it.
    """
    with leaders_group() as leaders:
        if not is_group_leader():
            return llama.engine.follow()
        with llama.engine.lead():
            answer_lines(llama, files, shared, seed, speculation, leaders)


def answer_lines(
    llama: Llama,
    files: BatchFiles | None,
    shared: Mapping[str, Any],
    seed: int,
    speculation: Mapping[str, Any],
    leaders: ProcessGroup | None,
) -> None:
    """Answer lines until there are no more. leaders: the ranks that do so; None: this one alone."""
    lines = files.read_requests(llama, shared, seed) if files else iter(())
    going = [0] * (1 if leaders is None else leaders.size())  # lines under way on each leader
    most = LINES_PER_ROW * llama.model.params.max_batch_size
    running: list[RunningLine] = []
    tokens, started = 0, time.monotonic()
    total, earlier = (files.count, files.earlier) if files else (0, 0)
    with progress_bar("completing", total, " lines", done=earlier) as bar:
        while True:
            with raise_in(leaders):
                arriving = [list(islice(lines, most - count)) for count in going]
            mine = hand_out(arriving, leaders)
            with raise_in(leaders):
                refused = begin_lines(llama, mine, running, speculation)
                over = wait_for_lines(llama, running, None if leaders is None else STEPS_BETWEEN_EXCHANGES)
                answered = [(one.line, one.answers()) for one in over]
                records = [*refused, *(make_record(llama, *pair) for pair in answered)]
                new_tokens = sum(len(a.tokens) for _, answers in answered if isinstance(answers, list) for a in answers)
            all_records, going, all_tokens = zip(*gather((records, len(running), new_tokens), leaders), strict=True)
            tokens += sum(all_tokens)
            if not any(going) and not any(all_records):
                return
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            with raise_in(leaders):
                if files:
                    files.records.add([record for one in all_records for record in one])
                    bar.update(len(files.records.places) - bar.n)


def begin_lines(
    llama: Llama, lines: list[LineRequest], running: list[RunningLine], speculation: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Have lines answered, and add them to `running`; returns the records of those that can't be answered."""
    refused = []
    for line in lines:
        try:
            running.append(RunningLine(llama, line, speculation))
        except LlamaError as e:
            refused.append(make_record(llama, line, e))
    return refused


def wait_for_lines(llama: Llama, running: list[RunningLine], most: int | None) -> list[RunningLine]:
    """Those that are over, at least one if there are any; removes them from `running`.

    most: steps of the engine after which there may be none, so that other ranks needn't wait for this one; None: any.
    """
    over: list[RunningLine] = []
    steps = 0
    while True:
        over += (new := [line for line in running if line.is_over()])
        running[:] = [line for line in running if line not in new]
        going = [s for line in running for s in line.sequences if not s.is_over]
        if not going or (over if most is None else steps == most):
            return over
        llama.engine.wait_any(going)
        steps += 1


def raise_in(leaders: ProcessGroup | None) -> contextlib.AbstractContextManager[None]:
    """`raise_together` for these ranks; None: there is one."""
    return contextlib.nullcontext() if leaders is None else raise_together(leaders)


def hand_out(parts: list[T], leaders: ProcessGroup | None) -> T:
    """This rank's part of those that the first rank has."""
    return parts[0] if leaders is None else broadcast_object(parts, leaders)[leaders.rank()]


def gather(value: T, leaders: ProcessGroup | None) -> list[T]:
    """The value of each of these ranks, on all of them."""
    if leaders is None:
        return [value]
    values: list[Any] = [None] * leaders.size()
    dist.all_gather_object(values, value, group=leaders)
    return values


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
        with raise_together(ranks):
            complete_remaining(build(), files, shared, seed, speculation or {})
    with raise_together(ranks):
        if files:
            files.records.finish()
    return files.summarize() if files else None
