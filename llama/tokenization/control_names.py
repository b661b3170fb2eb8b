"""Where a text has the names of control tokens, as the tokenizers library finds them.

Knows names and the library's normalizers; knows no words of a vocabulary.
"""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

import tokenizers

Place = tuple[int, int, int]  # start and end, in characters, and the id of the token


class ControlNames:
    """Names of control tokens.

    A name that is "normalized" is there wherever the normalized text has the normalized name: with "Lowercase", <END>
    is found in "<end>" too. The library finds them after all others, in the text between those.
    """

    def __init__(
        self, ids: Mapping[str, int], names: Set[str], flags: Mapping[str, tokenizers.AddedToken], normalizer: Any
    ) -> None:
        """ids, flags: by the names of all control tokens, of which only `names` are looked for."""
        self._ids, self._names, self._normalizer = ids, sorted(names), normalizer
        self._pattern = names_pattern(names) if names else None
        self._finder: tokenizers.Tokenizer | None = None
        if any(flags[name].normalized for name in names):
            self._finder = tokenizers.Tokenizer(tokenizers.models.BPE())  # without words: finds added tokens alone
            if normalizer is not None:
                self._finder.normalizer = normalizer
            for name in self._names:  # which so get the ids 0, 1, ...
                options = {flag: getattr(flags[name], flag) for flag in ("single_word", "lstrip", "rstrip")}
                self._finder.add_tokens([tokenizers.AddedToken(name, normalized=flags[name].normalized, **options)])

    def find(self, text: str, start: int = 0, end: int | None = None) -> Iterator[Place]:
        """The names in text[start:end], from left to right."""
        end = len(text) if end is None else end
        if self._finder is not None:
            encoding = self._finder.encode(text[start:end])
            for number, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
                name = self._names[number]
                yield *self._narrow(text, start + first, start + last, name), self._ids[name]
        elif self._pattern is not None:
            for match in self._pattern.finditer(text, start, end):
                yield *match.span(), self._ids[match[0]]

    def _narrow(self, text: str, start: int, end: int, name: str) -> tuple[int, int]:
        """The name alone, in a place that the library found.

        The library's may have white space that the token strips, and a space that stands where a normalizer puts one.
        """
        if (place := text.find(name, start, end)) >= 0:
            return place, place + len(name)
        end = start + len(text[start:end].rstrip())
        new = self._normalizer.normalize_str(name)
        starts = (i for i in range(end - 1, start, -1) if self._normalizer.normalize_str(text[i:end]) == new)
        return next(starts, start), end


def names_pattern(names: Set[str]) -> re.Pattern[str]:
    """A pattern of any of `names`, the longest of those that match; its one group makes `split` keep them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) + ")")
