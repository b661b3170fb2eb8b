"""The radix tree finds what a search through all holders finds, however they come, grow, shrink and go."""

from hypothesis import given
from hypothesis import strategies as st

from llama.engine.prefix_index import Node, PrefixIndex, count_common

# Few different tokens, so that much is shared.
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
CHANGES = st.tuples(st.integers(0, 5), st.sampled_from(["new", "grow", "cut", "remove"]), TEXTS)


def count_alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_nodes(node: Node, held: dict[int, list[int]], path: list[int]) -> int:
    """Check a tree; returns how many holders it has."""
    path = path + node.edge
    assert node.end == len(path)
    assert all(held[holder] == path for holder in node.holders)
    assert node.parent is None or (node.edge and (node.holders or len(node.children) > 1))
    assert all(child.parent is node and child.edge[0] == first for first, child in node.children.items())
    return len(node.holders) + sum(check_nodes(child, held, path) for child in node.children.values())


@given(st.lists(CHANGES, max_size=30), st.lists(TEXTS, min_size=1, max_size=5))
def test_it_finds_what_a_search_finds(changes: list[tuple[int, str, list[int]]], texts: list[list[int]]) -> None:
    index, held = PrefixIndex(), dict[int, list[int]]()
    for holder, change, text in changes:
        if change == "remove":
            index.remove(holder)
            held.pop(holder, None)
            continue
        if change == "new":
            index.remove(holder)
        elif holder in held and change == "grow":
            text = held[holder] + text
        elif holder in held:
            text = held[holder][: len(text)]
        held[holder] = text
        index.insert(holder, [*text, 9], len(text))  # a text may be longer than what is held of it
        assert len(index) == len(held) == check_nodes(index._root, held, [])
    for text in texts:
        for most in {len(text), len(text) - 1}:
            longest = max((count_alike(other, text[:most]) for other in held.values()), default=0)
            holders = {holder for holder, other in held.items() if longest and other[:longest] == text[:longest]}
            match = index.find(text, most)
            assert match.length == longest
            assert sorted(match.holders()) == sorted(holders)
            assert match.exact_holders() == sorted(holder for holder in holders if len(held[holder]) == longest)
            furthest = longest + 2
            assert {*match.holders(furthest)} == {holder for holder in holders if len(held[holder]) <= furthest}


def test_an_empty_one_finds_nothing() -> None:
    index = PrefixIndex()
    assert index.find([1, 2], 2).length == 0 and not [*index.find([1, 2], 2).holders()]
    index.insert(3, [1, 2], 2)
    index.remove(3)
    assert index.find([1, 2], 2).length == len(index) == 0


def test_the_nearest_holder_comes_first() -> None:
    index = PrefixIndex()
    for holder, length in ((1, 9), (2, 5), (3, 7)):
        index.insert(holder, [*range(9)], length)
    assert [*index.find([*range(9)], 5).holders()] == [2, 3, 1]
    assert [*index.find([*range(9)], 6).holders()] == [3, 1]


@given(TEXTS, TEXTS)
def test_counting(a: list[int], b: list[int]) -> None:
    assert count_common(a, b) == count_alike(a, b)
