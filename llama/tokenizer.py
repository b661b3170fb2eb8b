"""Text to token ids and back: Llama 3's tokenizer and its chat format.

`Tokenizer` is byte-pair encoding (by tiktoken) over a vocabulary file of "base64 rank" lines. `ChatFormat` encodes a
dialog as the chat models were trained on it. `StreamDecoder` turns ids that come one at a time into text.

Knows no tensors, no model and no sampling.
"""

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar, Literal, TypedDict, get_args

import tiktoken

from ._util.special_names import check_special, find_names
from ._util.validate import check_dialog, refuse_options
from ._util.vocabulary_file import read_vocabulary
from .errors import LlamaError, describe, shorten

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]

# tiktoken's regular expression gives up on long texts and on long runs, so longer ones are encoded in pieces. The ids
# depend on where the text is cut: these two numbers belong to the format.
MAX_TEXT_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")
END_OF_TURN = "<|eot_id|>"  # the control token after each message of a dialog
END_OF_MESSAGE = "<|eom_id|>"  # Llama 3.1: after a message that calls a tool, whose answer the same turn waits for
# The names of control tokens by their place; the other places are reserved. Llama 3.1 and later name three more.
_NAMES = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 9: END_OF_TURN}
_NAMES |= {6: "<|start_header_id|>", 7: "<|end_header_id|>"}
_STOPS = ("<|end_of_text|>", END_OF_TURN, END_OF_MESSAGE)
_NAMES_3_1 = _NAMES | {4: "<|finetune_right_pad_id|>", 8: END_OF_MESSAGE, 10: "<|python_tag|>"}


def _special_names(count: int, names: Mapping[int, str]) -> list[str]:
    """The names of the `count` control tokens in the order of their ids, reserved ones included."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(count))
    return [names.get(i) or next(reserved) for i in range(count)]


class Tokenizer:
    """Byte-pair encoding with Llama 3's split pattern and its 256 control tokens."""

    model: tiktoken.Encoding
    n_words: int  # how many ids there are, control tokens included: 0 .. n_words - 1
    special_tokens: dict[str, int]  # name -> id of each control token; their ids follow the vocabulary file's
    bos_id: int  # of <|begin_of_text|>
    eos_id: int  # of <|end_of_text|>
    pad_id: int  # -1, which is no token
    stop_tokens: set[int]  # the ids that end a generation
    is_llama_3_1: bool  # of Llama 3.1 or later, which has control tokens for calls of tools
    num_reserved_special_tokens: ClassVar[int] = 256
    pat_str: ClassVar[str] = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, model_path: str | os.PathLike[str], *, is_llama_3_1: bool = False) -> None:
        """Read the vocabulary at `model_path`, a local path or an object store's URL. The file is Llama 3.1's too.

        Raises:
            LlamaError: the file can't be read, or isn't such a vocabulary.
        """
        path = os.fspath(model_path)
        ranks = read_vocabulary(path)
        self.is_llama_3_1 = is_llama_3_1
        names = _special_names(self.num_reserved_special_tokens, _NAMES_3_1 if is_llama_3_1 else _NAMES)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(names)}
        self.model = tiktoken.Encoding(
            name=os.path.basename(path),
            pat_str=self.pat_str,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words = len(ranks) + len(names)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = -1
        self.stop_tokens = {token for name, token in self.special_tokens.items() if name in _STOPS}

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode `s`, in time linear in its length; lone surrogates are encoded as U+FFFD.

        Args:
            bos, eos: put <|begin_of_text|> before, <|end_of_text|> after.
            allowed_special: the control tokens whose names in `s` become those tokens. All others are plain text,
                so by default no text can make a control token.
            disallowed_special: names that `s` may not contain; "all" is every control token that isn't allowed.

        Raises:
            LlamaError: `s` isn't a str or contains a disallowed name.
        """
        allowed = check_special(s, self.special_tokens.keys(), allowed_special, disallowed_special)
        # The text is split at control tokens before it is cut in pieces, so that no cut goes through one.
        tokens = [self.bos_id] if bos else []
        start = 0
        for special in find_names(allowed, s):
            tokens += self._encode_plain(s[start : special.start()])
            tokens.append(self.special_tokens[special[0]])
            start = special.end()
        tokens += self._encode_plain(s[start:])
        if eos:
            tokens.append(self.eos_id)
        return tokens

    def decode(self, t: Sequence[int]) -> str:
        """The text of the ids `t`: control tokens as their names, bytes that aren't UTF-8 as U+FFFD.

        Raises:
            LlamaError: an id isn't in 0 .. n_words - 1.
        """
        for position, token in enumerate(t):
            if not 0 <= token < self.n_words:
                raise LlamaError(f"token id {token} at position {position} is outside 0..{self.n_words - 1}")
        return self.model.decode(t)

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one id, which needn't be whole UTF-8 characters. Raises LlamaError as `decode` does."""
        if not 0 <= token < self.n_words:
            raise LlamaError(f"token id {token} is outside 0..{self.n_words - 1}")
        return self.model.decode_single_token_bytes(token)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def _encode_plain(self, text: str) -> list[int]:
        return [token for piece in _pieces(text) for token in self.model.encode_ordinary(piece)]


class StreamDecoder:
    """Ids to text, one id at a time. A character that is split over several ids comes out whole, with the last of them.

    All that `push` and then `flush` return, joined, is `tokenizer.decode` of the ids. After `flush` the decoder is as
    new.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none. Raises LlamaError if the vocabulary hasn't this id."""
        return self._utf8.decode(self.tokenizer.decode_bytes(token))

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


class ChatFormat:
    """Dialogs as Llama 3's chat models were trained on them. No other code knows this format.

    A message is <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>. Role and content are encoded
    as plain text: nothing that a user writes can become a control token.
    """

    template: ClassVar[str] = (  # the same in Jinja, for Hugging Face's files
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer, *, extension: Callable[..., list[int] | None] = refuse_options) -> None:
        """extension: gets each dialog first, and what is asked for it; returns None for what is written here."""
        self.tokenizer, self._extension = tokenizer, extension

    @property
    def end_of_turn(self) -> int:
        """The id that ends a message."""
        return self.tokenizer.special_tokens[END_OF_TURN]

    def encode_header(self, message: Message) -> list[int]:
        """The ids before the content of `message`. Raises LlamaError if its role isn't one of ROLES."""
        role = get_field(message, "role")
        if role not in ROLES:
            raise LlamaError(f"unknown role {shorten(role)}; known roles are {', '.join(ROLES)}")
        header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"  # the role is one of those that are known
        return self.tokenizer.encode(header, bos=False, eos=False, allowed_special="all")

    def encode_message(self, message: Message) -> list[int]:
        """The ids of `message`, from header to <|eot_id|>, without white space around the content.

        Raises:
            LlamaError: an unknown role, no role or content, or one that isn't a str.
        """
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(get_field(message, "content").strip(), bos=False, eos=False),
            self.end_of_turn,
        ]

    def encode_dialog_prompt(self, dialog: Dialog, **options: Any) -> list[int]:
        """The ids of `dialog`, from <|begin_of_text|> to the header of the assistant's answer.

        options: for the extension. Raises LlamaError for an empty dialog, and which message `encode_message` refuses.
        """
        check_dialog(dialog)
        if (extended := self._extension(dialog, **options)) is not None:
            return extended
        tokens = [self.tokenizer.bos_id]
        for number, message in enumerate(dialog, start=1):
            try:
                tokens += self.encode_message(message)
            except LlamaError as error:
                raise LlamaError(f"message {number} of {len(dialog)}: {error}") from None
        return tokens + self.encode_header({"role": "assistant", "content": ""})


def get_field(message: object, name: str) -> str:
    """The text of this field of a message. Raises LlamaError where there is none."""
    if not isinstance(message, Mapping):
        raise LlamaError(f"a message is {describe(message)}; expected a dict with 'role' and 'content'")
    if name not in message:
        raise LlamaError(f"no {name!r}, only {sorted(map(str, message))}; expected 'role' and 'content'")
    value = message[name]
    if not isinstance(value, str):
        raise LlamaError(f"{name!r} is {describe(value)}; expected str")
    return value


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of MAX_TEXT_CHARS, in which no run of (non-)spaces is longer than MAX_RUN_CHARS."""
    for begin in range(0, len(text), MAX_TEXT_CHARS):
        part = text[begin : begin + MAX_TEXT_CHARS]
        start = 0
        if len(part) > MAX_RUN_CHARS:
            for run in _RUN.finditer(part):
                for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                    yield part[start:cut]
                    start = cut
        yield part[start:]
