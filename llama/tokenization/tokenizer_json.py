"""A tokenizer.json -> an object of the tokenizers library, in which no text can make a control token.

The library gets control tokens under random names, their aliases. Knows the file's format; knows no settings beside it.
"""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import LlamaError, describe, shorten, to_one_line

_EXPECTED = "expected the tokenizer.json that comes with a model"
_ALIAS_CHARS = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode's private use: no normalizer touches them


@contextmanager
def refuse_failures(what: str) -> Iterator[None]:
    """Turn any failure of the library into a LlamaError: "`what` (its reason)".

    Its panics, which a broken file can cause, are no Exception, and the library exports no name for their class.
    """
    try:
        yield
    except LlamaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LlamaError(f"{what} ({to_one_line(error)})") from None


def make_alias(name: str) -> str:
    """A random text. Its first and last character are part of words where those of `name` are: "single_word" asks."""
    start, end = ("0" if re.match(r"\w", edge) else "" for edge in (name[0], name[-1]))
    return start + "".join(secrets.choice(_ALIAS_CHARS) for _ in range(12)) + end  # 6400 ** 12 are 151 bits


def read_added_tokens(path: Path, source: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of "added_tokens", whose "content", "special" and "id" are checked.

    Raises:
        LlamaError: `source` isn't the content of a tokenizer.json.
    """
    if not isinstance(source.get("model"), dict):
        raise LlamaError(f"{path}: found JSON without a 'model', only {shorten(sorted(source))}; {_EXPECTED}")
    added = source.get("added_tokens", [])
    if not isinstance(added, list):
        raise LlamaError(f"{path}: 'added_tokens' is {describe(added)}; expected a list")
    for token in added:
        match token:
            case {"content": str(content), "special": bool(), "id": int()} if content:
                pass
            case _:
                raise LlamaError(
                    f"{path}: 'added_tokens' has {describe(token)}; expected 'id', 'content' and 'special'"
                )
    return added


def load_backend(
    path: Path, source: dict[str, Any], more: list[dict[str, Any]], aliases: dict[str, str]
) -> tokenizers.Tokenizer:
    """The library's tokenizer. more: tokens to add to those of the file, see `hf_settings.list_added_tokens`."""
    with refuse_failures(f"{path}: no tokenizer could be made of it; {_EXPECTED}"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(_rename_controls(source, aliases)))
        for token in more:
            flags = {key: value for key, value in token.items() if key not in ("id", "content")}
            backend.add_tokens([tokenizers.AddedToken(aliases.get(token["content"], token["content"]), **flags)])
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise LlamaError(f"{path}: the vocabulary is empty; {_EXPECTED}")
    return backend


def _rename_controls(source: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json with the control tokens under their aliases, in the vocabulary too, where they keep their ids.

    Merges that would make a control token from text are left out; so are truncation, padding, and what makes ids
    random: they are the same in every process.
    """

    def new(name: str) -> str:
        return aliases.get(name, name)

    def makes_words(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return aliases.keys().isdisjoint((left, right, left + right))

    model = dict(source["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new(name): token for name, token in vocab.items()}
    else:  # Unigram's, a list
        model["vocab"] = [[new(name), score] for name, score in vocab]
    for random in ("dropout", "alpha", "nbest_size"):  # BPE's; Unigram's, in newer files
        model.pop(random, None)
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if makes_words(merge)]
    if "unk_token" in model:
        model["unk_token"] = new(model["unk_token"])
    added = [token | {"content": new(token["content"])} for token in source.get("added_tokens", [])]
    return source | {"model": model, "added_tokens": added, "truncation": None, "padding": None}


def check_ids(path: Path, added: list[dict[str, Any]], ids: dict[str, int], aliases: dict[str, str]) -> None:
    """Raise LlamaError if a control token shares its id with a word, or an added token hasn't the stated id."""
    for token in added:
        name = token["content"]
        if (actual := ids.get(aliases.get(name, name))) != token["id"]:
            raise LlamaError(
                f"{path}: 'added_tokens' gives {shorten(name)} the id {token['id']}, but by its place it has "
                f"{actual}; expected the ids that follow the vocabulary's: get the file anew"
            )
    controls = {ids[alias]: name for name, alias in aliases.items()}
    alias_names = set(aliases.values())
    for word, shared in ids.items():
        if shared in controls and word not in alias_names:
            raise LlamaError(
                f"{path}: {shorten(word)} has the id {shared} of the control token {shorten(controls[shared])}; "
                "expected one id for each: get the file anew"
            )
