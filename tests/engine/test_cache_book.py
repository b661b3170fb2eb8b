"""The book of the cache: its sums are right after any changes, and it finds and drops what it should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.cache_book import CacheBook

CHANGES = st.tuples(
    st.sampled_from(["take", "resize", "retire", "adopt", "release", "touch", "forget", "release_scope"]),
    st.integers(0, 3),
    st.integers(1, 9),
)
TEXT = [*range(20)]


@given(st.lists(CHANGES, max_size=40))
def test_sums_and_order(changes: list[tuple[str, int, int]]) -> None:
    """Free, busy and idle slots, and their sizes, are those of a plain model."""
    book = CacheBook(4, 100)
    busy, idle = dict[int, int](), dict[int, int]()  # sizes; the least recently used first
    scopes = dict[int, int | None]()
    for change, slot, size in changes:
        if change == "take" and book.free:
            free = {*range(4)} - {*busy, *idle}
            slot = book.take(TEXT, size, scope := size % 2)
            assert slot == min(free)
            busy[slot], scopes[slot] = size, scope
        elif change == "resize" and slot in busy:
            book.resize(slot, size)
            busy[slot] = size
        elif change == "retire" and slot in busy:
            book.retire(slot, size)
            del busy[slot]
            idle[slot] = size
        elif change == "adopt" and slot in idle:
            book.adopt(slot, TEXT, min(size, idle.pop(slot)), 12)
            busy[slot] = 12
        elif change == "release" and slot in busy | idle:
            book.release(slot)
            busy.pop(slot, None)
            idle.pop(slot, None)
        elif change == "touch" and slot in idle:
            book.touch(slot)
            idle[slot] = idle.pop(slot)
        elif change == "forget":
            assert book.forget() == [*idle]
            idle, scopes = {}, dict.fromkeys(range(4))
        elif change == "release_scope":
            gone = [slot for slot in idle if scopes[slot] == 1]
            assert book.release_scope(1) == gone
            idle = {slot: size for slot, size in idle.items() if slot not in gone}
        assert (book.free, book.idle) == (4 - len(busy) - len(idle), len(idle))
        assert book.held == sum(busy.values()) + sum(idle.values()) == 100 - book.room
        assert book.idle_held == sum(idle.values())
        assert book.find_least_recent(()) == next(iter(idle), None)
        assert book.find_least_recent({0, 2, None}) == next((slot for slot in idle if slot % 2), None)
        assert [book.is_idle(slot) for slot in range(4)] == [slot in idle for slot in range(4)]
        for scope in (0, 1):
            held = [size for slot, size in idle.items() if scopes[slot] == scope]
            assert book.find(scope, TEXT, 20).length >= max(held, default=0)


def test_prefixes_are_found_in_their_scope_alone() -> None:
    book = CacheBook(3, 100)
    slots = [book.take(TEXT, 20, scope) for scope in (5, 6, None)]
    for slot in slots:
        book.record(slot, 10 + slot)
    assert [book.find(scope, TEXT, 20).length for scope in (5, 6, 7)] == [10, 11, 0]
    assert [book.is_shared(slot) for slot in slots] == [True, True, False]
    book.release(slots[0])
    assert book.find(5, TEXT, 20).length == 0 and not book.is_shared(slots[0])


def test_an_adopted_slot_holds_what_the_texts_share() -> None:
    book = CacheBook(1, 100)
    slot = book.take([1, 2, 3, 4], 4, 0)
    book.retire(slot, 4)
    other = [1, 2, 8, 9]
    book.adopt(slot, other, 2, 4)
    assert book.find(0, [1, 2, 3, 4], 4).length == 2
    book.record(slot, 4)
    assert book.find(0, other, 4).length == 4


def test_after_forgetting_a_busy_slot_is_nobody_elses() -> None:
    book = CacheBook(2, 100)
    slot = book.take(TEXT, 20, 0)
    book.record(slot, 10)
    book.forget()
    book.record(slot, 15)
    assert book.find(0, TEXT, 20).length == 0 and not book.is_shared(slot)
    assert book.held == 20


@pytest.mark.parametrize("taken", [0, 30, 150])
def test_calls_by_hand_take_room(taken: int) -> None:
    book = CacheBook(2, 100)
    book.take(TEXT, 20, 0)
    book.by_hand = taken
    assert book.room == 80 - taken
