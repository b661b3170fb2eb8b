"""Texts that end an answer: its pieces make no difference, and nothing of the stop is let through."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.stop_strings import StopFinder

quick = settings(deadline=None, max_examples=300)
texts = st.text("ab🙂", max_size=14)
stops = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=4)


def by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter: the text ends where it first ends with a stop, the longest of several."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@quick
@given(text=texts, stops=stops, cuts=st.lists(st.integers(0, 14)))
def test_pieces_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stop = by_hand(text, stops)
    finder, out = StopFinder(stops), ""
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for start, end in pairwise(places):
        out += finder.push(text[start:end])
        assert expected.startswith(out), "what is out can't be taken back"
        if finder.stop is not None:
            break
    else:
        out += finder.flush()
    assert (out, finder.stop) == (expected, stop)
    if stop is not None:
        assert finder.start == len(expected)


@quick
@given(text=texts, stops=stops)
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    out = finder.push(text)
    if finder.stop is None:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_to_find() -> None:
    finder = StopFinder(())
    assert finder.push("all") + finder.push(" of it") == "all of it" and finder.stop is None
