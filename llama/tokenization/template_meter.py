"""What the rendering of a template may take, of time and memory, and the counting of what it does take.

Knows plain values and Jinja's namespaces; knows no template.
"""

import time
from collections.abc import ItemsView, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

from ..errors import LlamaError

CPU_SECONDS = 2.0
MEMORY_BYTES = 256 * 2**20
STEPS = 1_000_000  # operations, and thousands of characters or entries that one goes through
LARGEST_NUMBER = 100_000  # of widths, counts and the like; the sandbox's own limit of range()
BYTES_OF_OBJECT = 150  # a Text beside its characters
MOST_ENTRIES, MOST_CHARACTERS = 1_000_000, 50_000_000  # of a value that is printed, compared, hashed or sorted
BYTES_OF_ENTRY = 8  # of a list, where its values exist already
BYTES_OF_ITEM = 100  # of a list of new values, and of a dict


class TemplateLimit(LlamaError):
    """A template takes too much time or memory."""


class Meter:
    """What one rendering has used. The count of steps is the same on every machine; the clock is a second bound."""

    def __init__(self) -> None:
        self.steps = 0
        self.bytes = 0  # that Texts and lists hold
        self._deadline = time.thread_time() + CPU_SECONDS

    def step(self, size: int = 0) -> None:
        """Count an operation on `size` characters or entries."""
        self.steps += 1 + size // 1000
        if self.steps > STEPS or time.thread_time() > self._deadline:
            raise TemplateLimit(f"the chat template takes too long: more than {CPU_SECONDS:g} s, or {STEPS:,} steps")

    def take(self, size: int) -> None:
        """Count bytes that are held from now on."""
        self.bytes += size
        self.check_room(0)

    def check_room(self, size: int) -> None:
        """Raise TemplateLimit if so many more bytes would be too many."""
        if self.bytes + size > MEMORY_BYTES:
            raise TemplateLimit(f"the chat template takes too much memory: more than {MEMORY_BYTES // 2**20} MB")


METER: ContextVar[Meter] = ContextVar("meter")  # of the rendering that goes on in this thread


def check_number(value: object) -> None:
    """Raise TemplateLimit for an integer that is too large for a width or a count."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise TemplateLimit(f"the chat template asks for {LARGEST_NUMBER:,} or more of something, which is too much")


def check_room(size: int) -> None:
    """Raise TemplateLimit if a Text of `size` characters would be too large."""
    meter = METER.get(None)
    if meter is not None:
        meter.check_room(2 * size)


def weigh(value: Any) -> None:
    """Count the characters and entries of a value, as often as they occur in it.

    A list that has another one twice, which has a third one twice and so on, is small in memory, but takes forever to
    print, hash or compare. Raises TemplateLimit if there are too many.
    """
    meter = METER.get()
    entries, characters, pending = 0, 0, [value]
    while pending:
        one = pending.pop()
        entries += 1
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, int | float | None):
            continue
        elif isinstance(one, list | tuple):
            pending += one
        elif isinstance(one, dict):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, Namespace):
            pending.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, KeysView | ValuesView | ItemsView):
            pending += one
        if entries + len(pending) > MOST_ENTRIES or characters > MOST_CHARACTERS:
            raise TemplateLimit("the chat template makes a value that is too large")
    meter.step(100 * entries + characters)
