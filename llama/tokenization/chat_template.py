"""The chat format of a tokenizer's model: its own Jinja template, or Llama 3's format.

`TemplateFormat` is to `HFTokenizer` what `ChatFormat` is to `Tokenizer`.
"""

from datetime import datetime
from typing import cast

from ..errors import LlamaError
from ..tokenizer import ChatFormat, Tokenizer
from .hf_tokenizer import HFTokenizer
from .llama_format import VARIABLES, LlamaFormat
from .protocol import AnyChatFormat, AnyTokenizer
from .template_filters import Refusal
from .template_format import TemplateFormat

__all__ = ["TemplateFormat", "find_fault", "find_variables", "make_formatter"]


def make_formatter(tokenizer: AnyTokenizer, now: datetime) -> AnyChatFormat:
    """The chat format of a tokenizer's model: its template, or Llama 3's. now: see TemplateFormat."""
    if isinstance(tokenizer, HFTokenizer):
        return TemplateFormat(tokenizer, now)
    llama3 = cast(Tokenizer, tokenizer)  # any other tokenizer has Llama 3's control tokens
    return ChatFormat(llama3, extension=LlamaFormat(llama3).encode)


def find_variables(formatter: AnyChatFormat) -> frozenset[str]:
    """The names of the variables that the model's template takes, beside the messages."""
    return formatter.variables if isinstance(formatter, TemplateFormat) else VARIABLES


def find_fault(tokenizer: AnyTokenizer) -> str | None:
    """What is wrong with the chat template, as a dialog of one message shows. That it refuses this one is no fault."""
    try:
        make_formatter(tokenizer, datetime.now()).encode_dialog_prompt([{"role": "user", "content": "Who are you?"}])
    except Refusal:
        return None
    except LlamaError as error:
        return str(error)
    return None
