"""Which copy is chosen: by the longest prefix, unless it has too much to do; in bounded memory."""

import json
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llama.server.routed_body import FIRST_BLOCK, read_routed
from llama.server.router import MOST_PARTS, Router, hash_prefixes

SLACK = 3
PROMPTS = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=6)
LOADS = st.dictionaries(st.integers(0, 3), st.integers(0, 9), min_size=1)


def count_common(one: list[bytes], other: list[bytes]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(st.lists(st.tuples(PROMPTS, st.integers(0, 3))), PROMPTS, LOADS)
def test_the_longest_prefix_of_those_with_little_to_do(
    given_before: list[tuple[list[bytes], int]], prompt: list[bytes], loads: dict[int, int]
) -> None:
    """As found by comparing the prompt with each one that was given."""
    router = Router[int](SLACK)
    for parts, copy in given_before:
        router.note(hash_prefixes(parts), copy)
    chosen = router.choose(hash_prefixes(prompt), loads)
    free = {copy for copy, load in loads.items() if load <= min(loads.values()) + SLACK}
    lengths = {copy: max([count_common(p, prompt) for p, c in given_before if c == copy], default=0) for copy in free}
    longest = max(lengths.values())
    assert chosen in free and lengths[chosen] == longest
    assert loads[chosen] == min(loads[copy] for copy in free if longest == 0 or lengths[copy] == longest)


@given(st.lists(st.tuples(PROMPTS, st.booleans()), max_size=60), st.integers(1, 4))
def test_no_copy_has_much_more_to_do_than_another(arrivals: list[tuple[list[bytes], bool]], copies: int) -> None:
    """Whatever is asked, and whoever has ended meanwhile: never chosen is a copy that has over SLACK more to do."""
    router, loads, under_way = Router[int](SLACK), dict.fromkeys(range(copies), 0), list[int]()
    for parts, ends in arrivals:
        least = min(loads.values())
        copy = router.choose(hash_prefixes(parts), loads)
        assert loads[copy] <= least + SLACK
        router.note(hash_prefixes(parts), copy)
        loads[copy] += 1
        under_way.append(copy)
        if ends:
            loads[under_way.pop(0)] -= 1


@given(st.lists(st.tuples(PROMPTS, st.integers(0, 3)), max_size=80), st.integers(1, 8))
def test_memory_is_bounded(arrivals: list[tuple[list[bytes], int]], capacity: int) -> None:
    router = Router[int](SLACK, capacity)
    for parts, copy in arrivals:
        router.note(hash_prefixes(parts), copy)
        assert len(router) <= capacity
    if arrivals and (last := hash_prefixes(arrivals[-1][0])[:1]):  # the most recent are those that stay
        assert router.choose(last, dict.fromkeys(range(4), 0)) in {copy for parts, copy in arrivals if parts}


@given(st.lists(st.tuples(PROMPTS, st.integers(0, 3)), max_size=40), st.integers(0, 3), PROMPTS)
def test_a_copy_that_is_forgotten_is_as_if_it_had_never_been_given_anything(
    arrivals: list[tuple[list[bytes], int]], lost: int, prompt: list[bytes]
) -> None:
    router, expected = Router[int](SLACK), Router[int](SLACK)
    for parts, copy in arrivals:
        router.note(hash_prefixes(parts), copy)
        expected.note(hash_prefixes(parts if copy != lost else []), copy)
    router.forget(lost)
    expected.forget(lost)
    loads = {0: 1, 1: 0, 2: 2, 3: 1}
    assert router.choose(hash_prefixes(prompt), loads) == expected.choose(hash_prefixes(prompt), loads)
    assert len(router) == len(expected)


def test_equal_copies_take_turns() -> None:
    router = Router[str](SLACK)
    chosen = []
    for i in range(6):
        prefixes = hash_prefixes([str(i).encode()])
        chosen.append(router.choose(prefixes, {"a": 0, "b": 0, "c": 0}))
        router.note(prefixes, chosen[-1])
    assert chosen == ["a", "b", "c"] * 2


def test_conversations_stay_where_they_began() -> None:
    """200 conversations of 5 turns, in any order, over 3 copies: each turn finds what the one before has left."""
    router, numbers = Router[int](SLACK), random.Random(1)
    turns = [conversation for conversation in range(200) for _ in range(5)]
    numbers.shuffle(turns)
    messages: dict[int, list[Any]] = {}
    places: dict[int, set[int]] = {}
    for conversation in turns:
        said = messages.setdefault(conversation, [])
        said += [{"role": "user", "content": f"{conversation} {len(said)}"}]
        prefixes = hash_prefixes(read_routed(json.dumps({"messages": said}).encode()).parts)
        loads = {copy: numbers.randint(0, SLACK) for copy in range(3)}
        copy = router.choose(prefixes, loads)
        router.note(prefixes, copy)
        places.setdefault(conversation, set()).add(copy)
        said += [{"role": "assistant", "content": "yes"}]
    assert all(len(copies) == 1 for copies in places.values())
    assert set.union(*places.values()) == {0, 1, 2}


TEXT = "The sea is wide and salty, and nobody has ever seen its end. " * 40


@given(st.integers(0, len(TEXT)), st.text(min_size=1))
def test_half_of_what_texts_have_in_common_is_seen(common: int, ending: str) -> None:
    first, second = (
        read_routed(json.dumps({"prompt": text}).encode()).parts for text in (TEXT, TEXT[:common] + ending)
    )
    shared = sum(len(part) for part in first[: count_common(first, second)])
    assert shared <= common + len(ending) + 1
    assert shared > (common - FIRST_BLOCK) / 2 - 1


def test_bodies() -> None:
    """The parts of a conversation's first messages are those of the whole one's beginning."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    longer = [*messages, {"content": "And now?", "role": "user"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    short, long, with_tools = (
        read_routed(json.dumps(body).encode())
        for body in ({"messages": messages}, {"n": 3, "messages": longer}, {"messages": messages, "tools": tools})
    )
    assert long.parts[:2] == short.parts and long.answers == 3
    assert with_tools.parts[0] != short.parts[0]
    several = read_routed(json.dumps({"prompt": [[1, 2], [3]], "best_of": 2, "n": 1}).encode())
    assert several.answers == 4
    assert read_routed(b'{"prompt": "abc", "cache_prompt": false, "n": 2}') == ([], 2)
    assert [read_routed(body) for body in (b"", b"[]", b"\xff", b"[" * 100_000)] == [([], 1)] * 4
    assert read_routed(b'{"prompt": [], "n": true, "messages": {"a": 1}, "input": 5}').answers == 1
    assert len(hash_prefixes([b"a"] * (2 * MOST_PARTS))) == MOST_PARTS
