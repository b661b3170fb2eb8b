"""The public names. Each is imported when it is first asked for: `import llama` alone takes no time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.lora import Lora, add_lora, merge_lora
    from .adapters.peft import load_adapter, save_adapter
    from .checkpoints.convert import convert
    from .checkpoints.inspect import inspect
    from .engine.attention_weights import attention_weights
    from .engine.outputs import ChatPrediction, Completion, CompletionPrediction
    from .engine.scoring import Score
    from .engine.sequence import Step
    from .errors import LlamaError
    from .generation import Llama
    from .model import ModelArgs, Transformer
    from .session import Session
    from .settings import Settings
    from .tasks.model import TaskModel
    from .tokenizer import ChatFormat, Dialog, Message, StreamDecoder, Tokenizer
    from .training.config import TrainingConfig
    from .training.trainer import finetune

NAMES = {
    "adapters.lora": "Lora add_lora merge_lora",
    "adapters.peft": "load_adapter save_adapter",
    "checkpoints.convert": "convert",
    "checkpoints.inspect": "inspect",
    "engine.attention_weights": "attention_weights",
    "engine.outputs": "ChatPrediction Completion CompletionPrediction",
    "engine.scoring": "Score",
    "engine.sequence": "Step",
    "errors": "LlamaError",
    "generation": "Llama",
    "model": "ModelArgs Transformer",
    "session": "Session",
    "settings": "Settings",
    "tasks.model": "TaskModel",
    "tokenizer": "ChatFormat Dialog Message StreamDecoder Tokenizer",
    "training.config": "TrainingConfig",
    "training.trainer": "finetune",
}
MODULES = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
