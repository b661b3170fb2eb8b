"""The public names."""

from .engine.outputs import ChatPrediction, Completion, CompletionPrediction
from .engine.scoring import Score
from .engine.sequence import Step
from .errors import LlamaError
from .generation import Llama
from .model import ModelArgs, Transformer
from .settings import Settings
from .tasks.model import TaskModel
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
