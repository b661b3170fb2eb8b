"""Which slots hold the longest prefix of a text: a radix tree, walked along the text.

A holder is any number (a slot, or the key of a request). A node stands for the tokens from the root to its end; a
holder is at the node where what it holds ends. Nodes without a holder have at least two children, so there are at most
twice as many nodes as holders. Knows nothing of what is done with a prefix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """The tokens between a parent's end and this node's."""

    parent: "Node | None"
    edge: list[int]
    end: int  # tokens from the root to here
    children: "dict[int, Node]" = field(default_factory=dict)  # by the first token of their edge
    holders: set[int] = field(default_factory=set)  # those that hold all up to here and no more


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of a text that somebody holds."""

    length: int = 0
    node: Node | None = None  # the first node at or behind its end; None where the length is 0

    def holders(self, furthest: int | None = None) -> Iterator[int]:
        """Those that hold it. furthest: only those that hold no more than so many tokens."""
        nodes = [self.node] if self.node else []
        while nodes:
            node = nodes.pop()
            if furthest is None or node.end <= furthest:
                yield from sorted(node.holders)
                nodes += node.children.values()

    def exact_holders(self) -> list[int]:
        """Those that hold it and no more."""
        return sorted(self.node.holders) if self.node and self.node.end == self.length else []


class PrefixIndex:
    """The prefixes that holders hold."""

    def __init__(self) -> None:
        self._root = Node(None, [], 0)
        self._nodes: dict[int, Node] = {}  # of each holder

    def __len__(self) -> int:
        return len(self._nodes)

    def insert(self, holder: int, tokens: list[int], length: int) -> None:
        """`holder` holds tokens[:length] from now on, which begins with what it held, or is a beginning of that."""
        before = self._nodes.get(holder, self._root)
        if before.end == length:
            return
        if before.holders == {holder} and not before.children and before.end < length:
            before.edge += tokens[before.end : length]
            before.end = length
            return
        node = self._reach(before if before.end < length else self._root, tokens, length)
        node.holders.add(holder)
        self._nodes[holder] = node
        before.holders.discard(holder)
        self._tidy(before)

    def remove(self, holder: int) -> None:
        """`holder` holds nothing any more. It may have held nothing."""
        node = self._nodes.pop(holder, None)
        if node is not None:
            node.holders.discard(holder)
            self._tidy(node)

    def find(self, tokens: Sequence[int], most: int) -> Match:
        """The longest prefix of tokens[:most] that somebody holds."""
        node, length = self._root, 0
        while length < most and (child := node.children.get(tokens[length])):
            common = count_common(child.edge, tokens[length : min(child.end, most)])
            node, length = child, length + common
            if length < child.end:
                break
        return Match(length, node) if length else Match()

    def _reach(self, node: Node, tokens: list[int], length: int) -> Node:
        """The node of tokens[:length], which go through `node`. It is made where there is none."""
        while node.end < length:
            child = node.children.get(tokens[node.end])
            if child is None:
                child = Node(node, tokens[node.end : length], length)
                node.children[child.edge[0]] = child
                return child
            common = count_common(child.edge, tokens[node.end : min(child.end, length)])
            node = child if common == len(child.edge) else split(child, common)
        return node

    def _tidy(self, node: Node) -> None:
        """Take `node` out of the tree, if it is there for nothing."""
        parent = node.parent
        if parent is None or node.holders:
            return
        if not node.children:
            del parent.children[node.edge[0]]
            self._tidy(parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            child.parent, child.edge = parent, node.edge + child.edge
            parent.children[child.edge[0]] = child


def split(node: Node, length: int) -> Node:
    """Divide a node's edge after `length` tokens. Returns the upper part, which is a new node."""
    assert node.parent is not None
    upper = Node(node.parent, node.edge[:length], node.end - len(node.edge) + length)
    node.parent.children[upper.edge[0]] = upper
    node.parent, node.edge = upper, node.edge[length:]
    upper.children[node.edge[0]] = node
    return upper


def count_common(edge: list[int], tokens: Sequence[int]) -> int:
    """How many tokens both begin with alike. Slices are compared, not tokens one by one."""
    low, high = 0, min(len(edge), len(tokens))
    if edge[:high] == tokens[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == tokens[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
