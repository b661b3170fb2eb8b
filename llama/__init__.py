"""The public names."""

from .errors import LlamaError
from .generation import Llama
from .model import ModelArgs, Transformer
from .results import ChatPrediction, Completion, CompletionPrediction
from .rows import Step
from .scoring import Score
from .settings import Settings
from .tasks import TaskModel
from .tokenizer import ChatFormat, Dialog, Message, StreamDecoder, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "Completion",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "LlamaError",
    "Message",
    "ModelArgs",
    "Score",
    "Settings",
    "Step",
    "StreamDecoder",
    "TaskModel",
    "Tokenizer",
    "Transformer",
]
