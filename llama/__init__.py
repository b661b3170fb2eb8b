"""The public names."""

from .errors import LlamaError
from .generation import ChatPrediction, CompletionPrediction, Llama, Step
from .model import ModelArgs, Transformer
from .tokenizer import ChatFormat, Dialog, Message, StreamDecoder, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "LlamaError",
    "Message",
    "ModelArgs",
    "Step",
    "StreamDecoder",
    "Tokenizer",
    "Transformer",
]
