"""What tests/adapters/test_lora.py runs on 1, 2 and 4 ranks: an adapter's outputs, gradients and files."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llama import LlamaError, parallel
from llama.adapters.lora import TARGETS, Lora, add_lora, lora_parameters, merge_lora
from llama.adapters.peft import load_adapter, save_adapter
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.schema import ranks_per_part, split_dim
from llama.model import ModelArgs, Transformer


def whole_gradients(model: Transformer, args: ModelArgs) -> dict[str, Tensor]:
    """Of every parameter of the adapter, as a training loop has to sum them."""
    size, found = dist.get_world_size(), {}
    for name, parameter in lora_parameters(model).items():
        pieces = [torch.empty_like(parameter) for _ in range(size)]
        dist.all_gather(pieces, parameter.grad)
        dim, alike = split_dim(name), ranks_per_part(name, args, size)
        if dim is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), name
            found[name] = pieces[0]
        else:
            found[name] = torch.cat([sum(pieces[i : i + alike]) for i in range(0, size, alike)], dim)
    return found


def refusal(model: Transformer, directory: str) -> str:
    try:
        save_adapter(model, directory)
    except LlamaError as e:
        return str(e)
    return ""


def compute(ckpt_dir: str, adapter_dir: str, output_dir: str) -> dict[str, object]:
    """Adapters are saved in the output directory's saved and fresh."""
    place, output = parallel.initialize(device="cpu", dtype=torch.float32), Path(output_dir)
    checkpoint = open_checkpoint(ckpt_dir)
    model = load_model(checkpoint, checkpoint.sizes, place)
    tokens = torch.arange(24).view(2, 12) * 5
    result: dict[str, object] = {"extra": load_adapter(model, adapter_dir)}
    logits = model(tokens)
    logits.logsumexp(-1).sum().backward()
    result |= {"logits": logits.detach(), "gradients": whole_gradients(model, checkpoint.sizes)}
    save_adapter(model, output / "saved", extra={"score.weight": torch.eye(3)}, task_type="SEQ_CLS")
    torch.manual_seed(dist.get_rank())  # which differs, and shall not matter
    with torch.no_grad():
        result["dropped"] = model.train()(tokens)
        merge_lora(model)
        result["merged"] = model(tokens)
    add_lora(model, Lora(5, 7.5, TARGETS), seed=3)
    save_adapter(model, output / "fresh")
    result["refused"] = refusal(model, str(output / "saved" / "adapter_config.json"))
    return result
