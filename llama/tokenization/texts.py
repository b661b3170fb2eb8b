"""Texts of ids: of one token, of an answer that follows a prompt, of a message that a model wrote.

The texts of a prompt and of its answer, joined, are the text of all their tokens decoded together. Knows no model.
"""

from collections.abc import Iterable, Sequence
from random import Random

from .hf_tokenizer import HFTokenizer
from .protocol import AnyStreamDecoder, AnyTokenizer
from .tool_calls import ToolForm
from .tool_parser import AnswerMessage, describe_message, parse_message

# So many of a prompt's last tokens decide how the text goes on: a character has at most 4 bytes, a mark few tokens.
_DECIDING_TOKENS = 32


def prime(decoder: AnyStreamDecoder, prompt: Sequence[int]) -> None:
    """Bring a new decoder to where it is after `prompt`: what follows may begin with a space, or end a character."""
    for token in prompt[-_DECIDING_TOKENS:]:
        decoder.push(token)


def decode_after(tokenizer: AnyTokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to that of `prompt`."""
    decoder = tokenizer.stream_decoder()
    prime(decoder, prompt)
    return "".join(map(decoder.push, tokens)) + decoder.flush()


def decode_token(tokenizer: AnyTokenizer, token: int) -> str:
    """The text of one token inside a text, where a SentencePiece token keeps its space."""
    return tokenizer.decode_bytes(token).decode("utf-8", errors="replace")


def name_tokens(tokenizer: AnyTokenizer, logprobs: Iterable[tuple[int, float]]) -> dict[str, float]:
    """The logprobs of tokens by their texts. Of tokens with one text, all but the first have their id behind it."""
    named: dict[str, float] = {}
    for token, logprob in logprobs:
        text = decode_token(tokenizer, token)
        named[f"{text} (token {token})" if text in named else text] = logprob
    return named


def read_content(tokenizer: AnyTokenizer, text: str) -> str:
    """The content of a message that a model wrote as `text`, or as its beginning.

    It is without the space that SentencePiece tokenizers put before every text, since they will put it there again.
    """
    return tokenizer.strip_lead(text) if isinstance(tokenizer, HFTokenizer) else text


def read_message(
    tokenizer: AnyTokenizer, form: ToolForm | None, prompt: Sequence[int], tokens: Sequence[int], text: str
) -> AnswerMessage:
    """The message that a model wrote as `text`, whose tokens are `tokens`, after a prompt.

    form: of its calls, where there were tools to call; None: all is content. The ids of calls are derived from the
    tokens, so that they are the same on all ranks, and whenever the same is generated.
    """
    content = read_content(tokenizer, text)
    if form is None:
        return {"role": "assistant", "content": content}
    in_reasoning = form.opens_reasoning(tokenizer.decode(prompt[-_DECIDING_TOKENS:]))
    random = Random(repr([*prompt, *tokens]))
    return describe_message(parse_message(content, form, True, in_reasoning=in_reasoning, random=random))
