"""Text to token ids and back by a Hugging Face tokenizer.json, through the tokenizers library.

`HFTokenizer` offers what `Tokenizer` does, and the source of the model's chat template. `open_tokenizer` reads the file
of either.

Knows no tensors and no model, and renders no chat template.
"""

import codecs
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import tokenizers

from .._util.files import read_json
from .._util.special_names import check_special
from ..errors import LlamaError, describe, shorten, to_one_line
from ..tokenizer import Tokenizer
from .hf_settings import read_chat_template, read_named_tokens, read_optional_json, read_stop_ids

_EXPECTED = "expected the tokenizer.json that comes with a model"
_SIBLINGS = "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # the token of a byte, for characters that are no tokens
_ALIAS_CHARS = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode's private use: no normalizer touches them


class HFTokenizer:
    """A tokenizer.json, with the settings in the files beside it.

    Those files are tokenizer_config.json, chat_template.jinja, generation_config.json and config.json. Any of them may
    be missing.

    Control tokens are the added tokens flagged special, and those named by a word in angle or square brackets. All
    other added tokens are words.
    """

    n_words: int  # how many ids there are: 0 .. n_words - 1. The model may have more, as padding
    special_tokens: dict[str, int]  # name -> id of each control token
    flagged_special: Set[str]  # the names of those that are flagged special
    named_tokens: dict[str, str]  # bos_token, eos_token and so on of tokenizer_config.json -> name
    bos_id: int  # of the token before a text; -1: the model has none
    eos_id: int  # of the token after a text; -1: the model has none
    pad_id: int  # -1, which is no token
    stop_tokens: set[int]  # the ids that end a generation
    chat_template: str | None  # the source of the Jinja template that writes a dialog as text

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the tokenizer.json at `path`, and the files beside it.

        Raises:
            LlamaError: a file can't be read or isn't what its name says, or two of them disagree.
        """
        path = Path(path)
        source = read_json(path, "a tokenizer")
        added = _added_tokens(path, source)
        byte_names = {token["content"] for token in added if _BYTE.fullmatch(token["content"])}
        self.flagged_special = {token["content"] for token in added if token["special"]} - byte_names
        controls = {token["content"] for token in added if _BRACKETED.fullmatch(token["content"])} - byte_names
        # The library gets control tokens under random names, so that their true names are plain text to it. A text with
        # control tokens is still encoded in one call, since how a word is split depends on what comes before it.
        aliases = {name: _new_alias() for name in controls | self.flagged_special}
        self._backend = _load(path, source, aliases)

        ids = self._backend.get_vocab(with_added_tokens=True)
        self.n_words = max(ids.values()) + 1
        self.special_tokens = {
            token["content"]: ids[aliases[token["content"]]] for token in added if token["content"] in aliases
        }
        self._names = {token: name for name, token in self.special_tokens.items()}
        self._aliases = {token: aliases[name] for token, name in self._names.items()}
        _check_ids(path, added, ids, aliases)
        model = source["model"]
        self._unknown = ids.get(aliases.get(model["unk_token"], "")) if model.get("unk_token") else model.get("unk_id")
        self._pieces = _Pieces(path, source.get("decoder"))

        probe = self._backend.encode(next(iter(aliases.values()), "a"), add_special_tokens=True)
        self._prefix = probe.ids[: probe.sequence_ids.index(0)] if 0 in probe.sequence_ids else []
        self._backend.post_processor = None  # some of them trim white space off the offsets
        self._read_siblings(path.parent)

    def _read_siblings(self, folder: Path) -> None:
        config_path, generation_path, model_path, template_path = (folder / name for name in _SIBLINGS)
        config = read_optional_json(config_path, "a tokenizer's settings")
        self.named_tokens = read_named_tokens(config_path, config)
        self.chat_template = read_chat_template(template_path, config_path, config)
        stops = read_stop_ids(generation_path, self.n_words) or read_stop_ids(model_path, self.n_words)
        bos = self._named_id(config_path, "bos_token")
        eos = self._named_id(config_path, "eos_token")
        if bos is None:
            bos = self._prefix[0] if len(self._prefix) == 1 else -1
        if eos is None:
            eos = stops[0] if stops else -1
        self.bos_id = bos
        self.eos_id = eos
        self.pad_id = -1
        self.stop_tokens = set(stops or [eos]) - {-1}

    def _named_id(self, config_path: Path, key: str) -> int | None:
        name = self.named_tokens.get(key)
        if name is not None and name not in self.special_tokens:
            raise LlamaError(f"{config_path}: {key} is {shorten(name)}, no control token of the tokenizer.json by it")
        return None if name is None else self.special_tokens[name]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode `s`; lone surrogates are encoded as U+FFFD.

        Args:
            bos: put the tokens before the text that the tokenizer.json asks for, which may be none.
            eos: put eos_id after the text.
            allowed_special: the control tokens whose names in `s` become those tokens. All others are plain text,
                so by default no text can make a control token.
            disallowed_special: names that `s` may not contain; "all" is every control token that isn't allowed.

        Raises:
            LlamaError: `s` isn't a str, contains a disallowed name, or can't be encoded; there is no eos_id.
        """
        allowed = check_special(s, self.special_tokens.keys(), allowed_special, disallowed_special)
        if eos and self.eos_id < 0:
            raise LlamaError("the model has no token for the end of a text; encode with eos=False")
        tokens = self._prefix if bos else []
        return tokens + self.encode_parts(self.split(s, allowed)) + ([self.eos_id] if eos else [])

    def split(self, text: str, names: Set[str]) -> list[str | int]:
        """`text` in parts: the ids of the control tokens that are in it and in `names`, and the text between them."""
        parts = names_pattern(names).split(text) if names else [text]
        return [self.special_tokens[part] if i % 2 else part for i, part in enumerate(parts)]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Encode parts as one text: an int is a control token, a str is plain text, even where it has a token's name.

        Nothing is put before or after.

        Raises:
            LlamaError: the tokenizer can't encode this text, or finds other control tokens in it than the ints.
        """
        return self.encoding(parts).ids

    def encoding(self, parts: Iterable[str | int]) -> tokenizers.Encoding:
        """As `encode_parts`, with the library's offsets, in characters; a pair of surrogates is one character."""
        parts = list(parts)
        text = "".join(self._aliases[part] if isinstance(part, int) else replace_surrogates(part) for part in parts)
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library has no narrower one
            raise LlamaError(f"the tokenizer can't encode the text ({to_one_line(error)})") from None
        expected = Counter(part for part in parts if isinstance(part, int))
        encoded = Counter(token for token in encoding.ids if token in self._names)
        # The unknown token isn't counted: it stands for any character without a token.
        for token in (expected | encoded).keys() - {self._unknown}:
            if expected[token] != encoded[token]:
                raise LlamaError(
                    f"the tokenizer finds the control token {self._names[token]!r} {encoded[token]} times in a text "
                    f"that has it {expected[token]} times; set its 'normalized' to false in tokenizer.json"
                )
        return encoding

    def decode(self, t: Sequence[int]) -> str:
        """The text of the ids `t`: control tokens as their names, bytes that aren't UTF-8 as U+FFFD.

        Ids past n_words - 1, which a model may have as padding, have no text.

        Raises:
            LlamaError: an id is negative.
        """
        for position, token in enumerate(t):
            if token < 0:
                raise LlamaError(f"token id {token} at position {position} is negative; expected ids from 0 up")
        text = b"".join(map(self.decode_bytes, t)).decode("utf-8", errors="replace")
        return _strip_lead(text, self._pieces.lead)[0]

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one id inside a text, which needn't be whole UTF-8 characters. Raises LlamaError if negative."""
        if token < 0:
            raise LlamaError(f"token id {token} is negative; expected ids from 0 up")
        if name := self._names.get(token):
            return name.encode()
        piece = self._backend.id_to_token(token) if token < self.n_words else None
        return b"" if piece is None else self._pieces.decode(piece)

    def stream_decoder(self) -> "HFStreamDecoder":
        """A decoder for ids that come one at a time."""
        return HFStreamDecoder(self, self._pieces.lead)


class HFStreamDecoder:
    """Ids to text, one id at a time. A character that is split over several ids comes out whole, with the last of them.

    All that `push` and then `flush` return, joined, is `tokenizer.decode` of the ids. After `flush` the decoder is as
    new.
    """

    def __init__(self, tokenizer: HFTokenizer, lead: int) -> None:
        """lead: how many spaces the tokens have before a text that aren't part of it."""
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._lead = self._lead_left = lead

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none. Raises LlamaError if it is negative."""
        text = self._utf8.decode(self.tokenizer.decode_bytes(token))
        text, self._lead_left = _strip_lead(text, self._lead_left)
        return text

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete, else nothing."""
        self._lead_left = self._lead
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """The bytes of the vocabulary's pieces, which are in one of two notations.

    GPT-2's has a letter for each byte ("ByteLevel"). SentencePiece's has "▁" for a space, and names such as <0x0A> for
    single bytes; and it puts a space before every text, or several (`lead` of them).
    """

    def __init__(self, path: Path, decoder: Any) -> None:
        """Read the "decoder" of a tokenizer.json. Raises LlamaError if it is neither notation."""
        self.lead = 0
        self._letters: dict[str, int] | None = None
        self._replaced: list[tuple[str, str]] = []
        for step in _steps(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._letters = byte_letters()
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    self._replaced.append((old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    self._replaced.append((old, " "))
                    self.lead += step.get("prepend_scheme") != "never"
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    self.lead += start
                case {"type": "ByteFallback" | "Fuse"}:  # `decode` does both for any vocabulary
                    pass
                case _:
                    raise LlamaError(
                        f"{path}: 'decoder' has the step {shorten(step)}; expected GPT-2's ByteLevel, or "
                        "SentencePiece's Replace, ByteFallback, Fuse, Strip and Metaspace"
                    )

    def decode(self, piece: str) -> bytes:
        if self._letters is not None:
            codes = [self._letters[letter] for letter in piece if letter in self._letters]
            return bytes(codes) if len(codes) == len(piece) else piece.encode()
        if _BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], base=16)])
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        return piece.encode()


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | HFTokenizer:
    """The tokenizer in the file at `path`: a tokenizer.json if it is a JSON object, else Llama 3's tokenizer.model.

    Raises:
        LlamaError: the file is neither; it says what was found.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except (OSError, ValueError):
        return Tokenizer(path)  # it reads URLs too, and says why a file can't be read
    is_object = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    return HFTokenizer(path) if is_object or os.fspath(path).endswith(".json") else Tokenizer(path)


def names_pattern(names: Set[str]) -> re.Pattern[str]:
    """A pattern of any of `names`, the longest of those that match; its one group makes `split` keep them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) + ")")


def byte_letters() -> dict[str, int]:
    """GPT-2's letter -> byte: visible letters of Latin-1 stand for themselves, those from U+0100 on for other bytes."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def replace_surrogates(text: str) -> str:
    """Replace pairs of surrogates by their character, and lone ones by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _strip_lead(text: str, lead: int) -> tuple[str, int]:
    """Strip up to `lead` spaces off the start; returns the rest, and how many may be stripped off what follows."""
    kept = text.removeprefix(" ") if lead else text
    if not lead or kept == text:
        return text, 0 if text else lead
    return _strip_lead(kept, lead - 1)


def _new_alias() -> str:
    return "".join(secrets.choice(_ALIAS_CHARS) for _ in range(12))  # 6400 ** 12 are 151 bits


def _added_tokens(path: Path, source: dict[str, Any]) -> list[dict[str, Any]]:
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


def _load(path: Path, source: dict[str, Any], aliases: dict[str, str]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(_rename_controls(source, aliases)))
    except Exception as error:  # the library has no narrower one, and values may be of any type
        raise LlamaError(f"{path}: no tokenizer could be made of it ({to_one_line(error)}); {_EXPECTED}") from None
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise LlamaError(f"{path}: the vocabulary is empty; {_EXPECTED}")
    return backend


def _rename_controls(source: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json with the control tokens under their aliases, in the vocabulary too, where they keep their ids.

    Merges that would make a control token from text are left out; so are truncation and padding.
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
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if makes_words(merge)]
    if "unk_token" in model:
        model["unk_token"] = new(model["unk_token"])
    added = [token | {"content": new(token["content"])} for token in source.get("added_tokens", [])]
    return source | {"model": model, "added_tokens": added, "truncation": None, "padding": None}


def _check_ids(path: Path, added: list[dict[str, Any]], ids: dict[str, int], aliases: dict[str, str]) -> None:
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


def _steps(decoder: Any) -> list[Any]:
    match decoder:
        case {"type": "Sequence", "decoders": list(steps)}:
            return [inner for step in steps for inner in _steps(step)]
        case _:
            return [decoder]
