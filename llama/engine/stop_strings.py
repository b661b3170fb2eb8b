"""Texts that end an answer, found in a text that comes in pieces. Knows strings only."""

from collections.abc import Sequence


class StopFinder:
    """Lets a text through piece by piece, but for what may begin one of `stops`, and ends before the first.

    The first is the one that is complete first, and of several the longest: whatever pieces the text comes in, the same
    one is found. found: which that was, or None; start: where it begins in the text.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self.start = 0
        self.seen = 0  # characters of the text so far
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What can be let out now that `text` has come."""
        self.seen += len(text)
        text = self._held + text
        first = self.seen - len(text)
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, _, self.found = min(ends)
            self.start, self._held = first + end - len(self.found), ""
            return text[: end - len(self.found)]
        held = max((beginning(stop, text) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def beginning(stop: str, text: str) -> int:
    """The most characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
