"""What is wrong with a tokenizer.json that still makes a tokenizer: for `inspect`, which lists it.

Knows the file's JSON; makes no tokenizer of it.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._util.files import read_json
from .._util.validate import is_integer
from ..errors import shorten


def find_vocabulary_problems(path: Path) -> list[str]:
    """A line for each kind of fault in the vocabulary.

    Raises LlamaError for a file that isn't JSON.
    """
    source = read_json(path, "a tokenizer")
    model = source.get("model")
    words = list(read_words(model if isinstance(model, dict) else {}))
    added = source.get("added_tokens")
    special = [
        (token["content"], token["id"])
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and isinstance(token.get("content"), str) and is_integer(token.get("id"))
    ]
    problems = []
    names: dict[int, set[str]] = {}
    for word, token in words + special:
        names.setdefault(token, set()).add(word)
    if shared := {token: sorted(words) for token, words in names.items() if len(words) > 1}:
        token, pair = next(iter(shared.items()))
        problems.append(f"{pair[0]!r:.60} and {pair[1]!r:.60} both have the id {token}{count_more(len(shared))}")
    if repeated := [word for word, count in Counter(word for word, _ in words).items() if count > 1]:
        problems.append(f"{shorten(repeated[0])} is in the vocabulary twice{count_more(len(repeated))}")
    if negative := [word for word, token in words + special if token < 0]:
        problems.append(f"{shorten(negative[0])} has an id below 0{count_more(len(negative))}")
    return [f"{path}: {problem}" for problem in problems]


def count_more(count: int) -> str:
    """ " (and N more)", if there are more faults of a kind than the one that is shown."""
    return f" (and {count - 1} more such)" if count > 1 else ""


def read_words(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(word, id) of the model's vocabulary: a dict of ids, or Unigram's list of pairs."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        yield from ((word, token) for word, token in vocab.items() if is_integer(token))
    elif isinstance(vocab, list):
        for token, entry in enumerate(vocab):
            if isinstance(entry, list) and entry and isinstance(entry[0], str):
                yield entry[0], token
