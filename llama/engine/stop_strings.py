"""Texts that end an answer, looked for in a text that comes in pieces. Knows strings only."""

from collections.abc import Sequence


class StopFinder:
    """Passes a text on piece by piece, and ends it before the first stop.

    What may be the beginning of a stop is held back until it is certain. The first stop is the one that is complete
    first; of several that end at one place, the longest. So the pieces in which the text comes make no difference.
    """

    def __init__(self, stops: Sequence[str]):
        self.stop: str | None = None  # the stop that the text has reached
        self.start = 0  # the character of the text at which it begins
        self.seen = 0  # characters of the text so far
        self._stops = stops
        self._held = ""  # the end of the text so far, which may begin a stop

    def push(self, text: str) -> str:
        """Add the next piece; returns what is certain now."""
        self.seen += len(text)
        text = self._held + text
        first = self.seen - len(text)
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, _, self.stop = min(ends)
            self.start, self._held = first + end - len(self.stop), ""
            return text[: end - len(self.stop)]
        held = max((count_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def count_overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`: at most all but its last."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
