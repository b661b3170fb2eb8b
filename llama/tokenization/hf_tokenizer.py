"""Text to token ids and back by a Hugging Face tokenizer.json, through the tokenizers library.

`HFTokenizer` offers what `Tokenizer` does, and the source of the model's chat template. `open_tokenizer` reads the file
of either.

Knows no tensors and no model, and renders no chat template.
"""

import codecs
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import tokenizers

from .._util.console import print_note
from .._util.files import check_expanded, open_file, read_json
from .._util.ranks import is_main_process
from .._util.special_names import check_special
from .._util.urls import check_url
from ..errors import LlamaError, shorten
from ..model import ModelArgs
from ..tokenizer import Tokenizer
from .control_names import ControlNames
from .hf_settings import (
    CONFIG,
    list_added_tokens,
    read_chat_templates,
    read_config,
    read_named_tokens,
    read_split,
    read_stop_ids,
)
from .pieces import BYTE, Pieces, strip_lead
from .surroundings import Surroundings, find_surroundings
from .tokenizer_classes import apply_class
from .tokenizer_json import check_ids, load_backend, make_alias, read_added_tokens, refuse_failures
from .versions import is_llama_3_1

_SIBLINGS = CONFIG, "generation_config.json", "config.json"
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class HFTokenizer:
    """A tokenizer.json, with the settings in the files beside it.

    Those files are tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
    generation_config.json and config.json. Any of them may be missing.

    Control tokens are the added tokens flagged special, those that a setting names (bos_token and so on), and those
    named by a word in angle or square brackets. All other added tokens are words.
    """

    n_words: int  # how many ids there are: 0 .. n_words - 1. The model may have more, as padding
    n_vocabulary: int  # those of them that aren't added tokens: 0 .. n_vocabulary - 1
    special_tokens: dict[str, int]  # name -> id of each control token
    flagged_special: Set[str]  # the names of those that are flagged special
    template_names: Set[str]  # the names that a chat template makes control tokens of; most often all
    named_tokens: dict[str, str]  # bos_token, eos_token and so on of tokenizer_config.json -> name
    bos_id: int  # of the token before a text; -1: the model has none
    eos_id: int  # of the token after a text; -1: the model has none
    pad_id: int  # -1, which is no token
    stop_tokens: set[int]  # the ids that end a generation
    around_text: Surroundings  # what the tokenizer.json puts around a text
    around_pair: Surroundings | None  # what it puts around and between two texts; None: it changes their order
    chat_template: str | None  # the source of the Jinja template that writes a dialog as text
    tool_template: str | None  # of one for dialogs with tools, where the model has two

    def __init__(self, path: str | os.PathLike[str], vocab_size: int | None = None) -> None:
        """Read the tokenizer.json at `path`, and the files beside it.

        vocab_size: of the model. Added tokens that it doesn't know, with ids from that on, are refused in every text.

        Raises:
            LlamaError: a file can't be read or isn't what its name says, or two of them disagree.
        """
        path = Path(path)
        source = read_json(path, "a tokenizer")
        in_file = read_added_tokens(path, source)
        config = read_config(path.parent)
        source = apply_class(source, path, config)
        more = list_added_tokens(path.parent, config, in_file)
        added = in_file + more
        byte_names = {token["content"] for token in added if BYTE.fullmatch(token["content"])}
        self.flagged_special = {token["content"] for token in added if token["special"]} - byte_names
        controls = {token["content"] for token in added if _BRACKETED.fullmatch(token["content"])} - byte_names
        # The library gets control tokens under random names, so that their true names are plain text to it. A text with
        # control tokens is still encoded in one call, since how a word is split depends on what comes before it.
        aliases = {name: make_alias(name) for name in controls | self.flagged_special}
        self._backend = load_backend(path, source, more, aliases)

        ids = self._backend.get_vocab(with_added_tokens=True)
        self.n_words = max(ids.values()) + 1
        self._usable = range(self.n_words if vocab_size is None else vocab_size)
        added_names = {aliases.get(token["content"], token["content"]) for token in added}
        self.n_vocabulary = max((token for word, token in ids.items() if word not in added_names), default=-1) + 1
        self.special_tokens = {
            token["content"]: ids[aliases[token["content"]]] for token in added if token["content"] in aliases
        }
        check_ids(path, in_file, ids, aliases)
        self._names = {token: name for name, token in self.special_tokens.items()}
        self._aliases = {token: aliases[name] for token, name in self._names.items()}
        flags = self._backend.get_added_tokens_decoder()
        self._flags = {name: flags[token] for token, name in self._names.items()}
        model = source["model"]
        self._unknown = ids.get(aliases.get(model["unk_token"], "")) if model.get("unk_token") else model.get("unk_id")
        self._pieces = Pieces(path, source.get("decoder"))

        probe = next(iter(aliases.values()), make_alias("<>"))  # any token; a vocabulary may have no other sure text
        with refuse_failures(f"{path}: its 'post_processor' fails"):
            self._backend.add_tokens([] if aliases else [probe])
            self.around_text = find_surroundings(self._backend.encode(probe)) or Surroundings()
            self.around_pair = find_surroundings(self._backend.encode(probe, probe))
        self._backend.post_processor = None  # some of them trim white space off the offsets
        self._read_siblings(path.parent, config)

    def _read_siblings(self, folder: Path, config: dict[str, Any]) -> None:
        config_path, generation_path, model_path = (folder / name for name in _SIBLINGS)
        self.named_tokens = read_named_tokens(config_path, config)
        templates = read_chat_templates(folder, config_path, config)
        self.chat_template, self.tool_template = templates.get("default"), templates.get("tool_use")
        is_split = read_split(config_path, config)
        self.template_names = self.special_tokens.keys() - (self.flagged_special if is_split else frozenset())
        if is_split and templates and is_main_process():
            print_note(
                f"({config_path}: split_special_tokens is true, so special tokens in dialogs are plain text, as in "
                "transformers)"
            )
        stops = read_stop_ids(generation_path, self.n_words) or read_stop_ids(model_path, self.n_words)
        bos = self._named_id(config_path, "bos_token")
        eos = self._named_id(config_path, "eos_token")
        if bos is None:
            bos = self.around_text.before[0] if len(self.around_text.before) == 1 else -1
        if eos is None:
            eos = stops[0] if stops else -1
        self.bos_id = bos
        self.eos_id = eos
        self.pad_id = -1
        self.stop_tokens = {token for token in stops or [eos] if token in self._usable}

    def _named_id(self, config_path: Path, key: str) -> int | None:
        name = self.named_tokens.get(key) or None
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
        tokens = [*self.around_text.before] if bos else []
        end = [self.check_usable(self.eos_id)] if eos else []
        return tokens + self.encode_parts(self.split(s, allowed)) + end

    def split(self, text: str, names: Set[str]) -> list[str | int]:
        """`text` in parts: the ids of the control tokens that are in it and in `names`, and the text between them."""
        if not names:
            return [text]
        parts: list[str | int] = []
        place, text = 0, replace_surrogates(text)
        for start, end, token in self.find_controls(names).find(text):
            parts += [text[place:start], token]
            place = end
        return [*parts, text[place:]]

    def find_controls(self, names: Set[str]) -> ControlNames:
        """What finds these control tokens in texts."""
        return ControlNames(self.special_tokens, names, self._flags, self._backend.normalizer)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Encode parts as one text: an int is a control token, a str is plain text, even where it has a token's name.

        Nothing is put before or after.

        Raises:
            LlamaError: the tokenizer can't encode this text, or makes control tokens of it that the ints don't have.
        """
        return self.encoding(parts).ids

    def encoding(self, parts: Iterable[str | int]) -> tokenizers.Encoding:
        """As `encode_parts`, with the library's offsets, in characters; a pair of surrogates is one character.

        Where the library doesn't find a control token in its place, the token's name is text there, as in transformers:
        one marked "single_word" beside a letter, or "normalized" where the normalizer changes what is around it.
        """
        parts = [part if isinstance(part, int) else replace_surrogates(part) for part in parts]
        while True:
            texts = [self._aliases[part] if isinstance(part, int) else part for part in parts]
            with refuse_failures("the tokenizer can't encode the text"):
                encoding = self._backend.encode("".join(texts), add_special_tokens=False)
            missing = self._find_missing(parts, texts, encoding)
            if not missing:
                self.check_usable(*encoding.ids)
                return encoding
            parts = [self._names[int(part)] if i in missing else part for i, part in enumerate(parts)]

    def check_usable(self, *tokens: int) -> int:
        """The last of `tokens`. Raises LlamaError if the model doesn't know one of them."""
        if tokens and (largest := max(tokens)) not in self._usable:
            raise LlamaError(
                f"the text has the token {self.decode([largest])!r}, whose id {largest} the model of vocab_size "
                f"{len(self._usable)} doesn't know: leave it out"
            )
        return tokens[-1] if tokens else -1

    def _find_missing(
        self, parts: Sequence[str | int], texts: Sequence[str], encoding: tokenizers.Encoding
    ) -> set[int]:
        """The places among `parts` of the control tokens that the encoding of `texts` hasn't.

        Raises:
            LlamaError: the encoding has other control tokens.
        """
        expected = Counter(part for part in parts if isinstance(part, int))
        encoded = Counter(token for token in encoding.ids if token in self._names)
        # The unknown token isn't counted: it stands for any character without a token.
        differing = {t for t in expected | encoded if expected[t] != encoded[t]} - {self._unknown}
        for token in differing:
            if encoded[token] > expected[token]:
                raise LlamaError(
                    f"the tokenizer finds the control token {self._names[token]!r} {encoded[token]} times in a text "
                    f"that has it {expected[token]} times: its tokenizer.json makes this token out of text"
                )
        if not differing:
            return set()
        starts = list(accumulate(map(len, texts), initial=0))
        found = [(t, *span) for t, span in zip(encoding.ids, encoding.offsets, strict=True) if t in differing]
        return {
            i
            for i, part in enumerate(parts)
            if part in differing and not any(t == part and a < starts[i + 1] and b > starts[i] for t, a, b in found)
        }

    def decode(self, t: Sequence[int]) -> str:
        """The text of the ids `t`: control tokens as their names, bytes that aren't UTF-8 as U+FFFD.

        Ids past n_words - 1, which a model may have as padding, have no text.

        Raises:
            LlamaError: an id is negative.
        """
        for position, token in enumerate(t):
            if token < 0:
                raise LlamaError(f"token id {token} at position {position} is negative; expected ids from 0 up")
        return self.strip_lead(b"".join(map(self.decode_bytes, t)).decode("utf-8", errors="replace"))

    def strip_lead(self, text: str) -> str:
        """`text` without the spaces that the tokenizer put before it."""
        return strip_lead(text, self._pieces.lead)[0]

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one id inside a text, which needn't be whole UTF-8 characters. Raises LlamaError if negative."""
        if token < 0:
            raise LlamaError(f"token id {token} is negative; expected ids from 0 up")
        if name := self._names.get(token):
            return self._pieces.before + name.encode()
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
        text, self._lead_left = strip_lead(text, self._lead_left)
        return text

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete, else nothing."""
        self._lead_left = self._lead
        return self._utf8.decode(b"", final=True)


def open_tokenizer(path: str | os.PathLike[str], args: ModelArgs | None = None) -> Tokenizer | HFTokenizer:
    """The tokenizer in the file at `path`: a tokenizer.json if it is a JSON object, else Llama 3's tokenizer.model.

    args: the model's sizes, which show whether a tokenizer.model is Llama 3.1's. None: it is Llama 3's.

    Raises:
        LlamaError: the file is neither; it says what was found.
    """
    is_new = args is not None and is_llama_3_1(args)
    try:
        with open_file(path) as file:
            start = file.read(256)
    except (OSError, ValueError):
        check_url(os.fspath(path))
        check_expanded(path)
        return Tokenizer(path, is_llama_3_1=is_new)  # it reads URLs too, and says why a file can't be read
    is_object = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    if is_object or os.fspath(path).endswith(".json"):
        return HFTokenizer(path, args.vocab_size if args is not None and args.vocab_size > 0 else None)
    return Tokenizer(path, is_llama_3_1=is_new)


def replace_surrogates(text: str) -> str:
    """Replace pairs of surrogates by their character, and lone ones by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
