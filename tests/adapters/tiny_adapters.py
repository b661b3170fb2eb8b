"""What the tests of adapters share: a tiny model, the same adapter put on by us and by peft, and comparisons."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Twin, make_twin, neighbours
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.adapters.lora import TARGETS, Lora, add_lora, lora_parameters
from llama.parallel import Place

ARGS = ModelArgs(64, 2, 8, 2, 128, 32)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head"]
NAMES = dict(zip(TARGETS, PROJECTIONS, strict=True))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def twin(place: Place) -> Twin:
    return make_twin(ARGS)


@pytest.fixture
def model(twin: Twin) -> Transformer:
    return copy.deepcopy(twin.ours)


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def randomized(parameters: dict[str, Tensor]) -> None:
    """Random numbers for A and B, large enough that a wrong one shows."""
    generator = torch.Generator().manual_seed(11)
    for name in sorted(parameters):
        parameters[name].data.normal_(std=0.2, generator=generator)


def adapted(twin: Twin, *targets: str, **options: Any) -> Transformer:
    model = copy.deepcopy(twin.ours)
    add_lora(model, Lora(4, 12, targets or TARGETS, **options), seed=1)
    randomized(lora_parameters(model))
    return model


def wrapped(peft: Any, twin: Twin, *targets: str, **options: Any) -> Any:
    """The same adapter put on by peft."""
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": [*targets], **options}
    theirs = peft.get_peft_model(copy.deepcopy(twin.theirs), peft.LoraConfig(**config)).eval()
    randomized({name: p for name, p in theirs.named_parameters() if "lora_" in name})
    return theirs


def save(theirs: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the output layer's own matrix is written too
        theirs.save_pretrained(directory)
    return directory


def open_adapter(peft: Any, base: Any, directory: Path) -> Any:
    """Loaded by peft without a warning, which it gives for missing and for surplus tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, on what peft calls
        return peft.PeftModel.from_pretrained(base, directory).eval()


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens) if isinstance(model, Transformer) else model(input_ids=tokens, use_cache=False).logits


def hf_key(name: str, suffix: str = "") -> str:
    """Our name of an adapter's parameter -> peft's."""
    *place, layer, kind = name.split(".")
    if not place:
        return f"base_model.model.lm_head.{kind}{suffix}.weight"
    part = "self_attn" if place[-1] == "attention" else "mlp"
    return f"{ROOT}.{place[1]}.{part}.{NAMES[layer]}.{kind}{suffix}.weight"


def in_our_order(name: str, tensor: Tensor) -> Tensor:
    heads = {"wq.lora_B": ARGS.n_heads, "wk.lora_B": ARGS.n_kv_heads}.get(".".join(name.split(".")[-2:]))
    return tensor if heads is None else neighbours(tensor, heads)
