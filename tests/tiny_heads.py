"""Tiny random models of transformers with task heads, for the tests of heads and of fine-tuning."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 511, "head_dim": 8}
LABELS = {0: "cat", 1: "dog", 2: "é漢字🙂"}
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
ENDINGS = {
    "language": "CausalLM",
    "classify": "SequenceClassification",
    "tag": "TokenClassification",
    "answer": "QuestionAnswering",
}
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}


def make(family: str, task: str, **config: Any) -> PreTrainedModel:
    kind, own = FAMILIES[family]
    made = AutoConfig.for_model(kind, **{**SIZES, **own, "id2label": LABELS, "classifier_dropout": 0.0, **config})
    model = getattr(transformers, f"{NAMES[kind]}For{ENDINGS[task]}")._from_config(made, attn_implementation="eager")
    chance = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=chance)
        if weight.ndim == 2:
            noise *= 1 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
        weight.data.copy_(noise if weight.ndim == 2 or name.endswith("bias") else 1 + 0.3 * noise)
    return model.train()


def quiet_load(directory: Path, task: str) -> PreTrainedModel:
    """Loaded by transformers, without a warning."""
    said: list[str] = []
    logger = transformers.utils.logging.get_logger("transformers")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            model = getattr(transformers, f"AutoModelFor{ENDINGS[task]}").from_pretrained(directory)
    finally:
        logger.removeHandler(handler)
    assert not said and not warned
    return model.eval()
