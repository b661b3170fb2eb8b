"""Adapters that peft makes on a small base, what it computes with them, and their directories."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import write_tokenizer
from torch import Tensor

WORDS = 512  # those of tiny.write_tokenizer
IDS = torch.randint(0, WORDS - 32, (2, 17), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def write_base(directory: Path, kind: str = "Llama", **settings: Any) -> Path:
    """A random model of transformers' with this project's smallest tokenizer. kind: of its configuration's class."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "bos_token_id": None, "eos_token_id": None, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.3, generator=generator)
    model.save_pretrained(directory)
    write_tokenizer(directory / "tokenizer.model")
    return directory


@dataclass(frozen=True)
class Made:
    directory: Path  # of the adapter
    logits: Tensor  # peft's, of IDS


def make_adapter(
    base: Path, directory: Path, resize: int = 0, save: dict[str, Any] | None = None, seed: int = 5, **options: Any
) -> Made:
    """An adapter that differs from its start in all that is trained. resize: words more than the base's.

    options: of peft's LoraConfig. save: of its `save_pretrained`.
    """
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        if resize:
            model.resize_token_embeddings(WORDS + resize, mean_resizing=False)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        theirs = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options})).eval()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += torch.empty_like(parameter).normal_(std=0.1, generator=generator)
            logits = theirs(input_ids=IDS, use_cache=False).logits
        theirs.save_pretrained(directory, **(save or {}))
    return Made(directory, logits)


def reload_logits(base: Path, directory: Path) -> Tensor:
    """What peft computes with an adapter that it reads from a directory."""
    import peft
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, directory).eval()(input_ids=IDS, use_cache=False).logits


def change_config(directory: Path, **keys: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return directory


def change_tensors(directory: Path, change: Any) -> Path:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return directory
