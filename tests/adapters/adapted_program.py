"""What tests/adapters/test_adapted_ranks.py runs on several ranks: logits with adapters, merged and on the layers."""

from pathlib import Path

import torch
from peft_models import IDS
from torch import Tensor

from llama import Llama, TaskModel, load_adapter, save_adapter
from llama.adapters.lora import lora_parameters
from llama.checkpoints.schema import ranks_per_part, split_dim


def gather(model: torch.nn.Module, name: str, gradient: Tensor, ranks: int) -> Tensor:
    """The whole gradient, as a training loop has to sum it."""
    dim, alike = split_dim(name), ranks_per_part(name, model.params, ranks)
    parts = [torch.empty_like(gradient) for _ in range(ranks)]
    torch.distributed.all_gather(parts, gradient.contiguous())
    if dim is None:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    return torch.cat([sum(parts[i : i + alike]) for i in range(0, ranks, alike)], dim)


def compute(jobs: list[tuple[str, str, bool]], output: str) -> list[dict[str, Tensor]]:
    """jobs: (base, adapter, whether a model in memory can take it)."""
    results = []
    for i, (base, adapter, fits_memory) in enumerate(jobs):
        options = {"device": "cpu", "dtype": "float32"}
        task = TaskModel.build(base, adapter_dir=adapter, **options)
        with torch.no_grad():
            result = {
                "merged": Llama.build(base, adapter_dir=adapter, **options).model(IDS),
                "apart": task.model(IDS),
                "quantized": Llama.build(base, adapter_dir=adapter, quantization="int8", **options).model(IDS, 0),
            }
        task.save(Path(output) / f"saved{i}")
        if fits_memory:
            model = Llama.build(base, **options).model
            load_adapter(model, adapter)
            logits = model(IDS)
            logits.logsumexp(-1).sum().backward()
            ranks = torch.distributed.get_world_size()
            result |= {"loaded": logits.detach(), "cached": model(IDS, 0)}
            result |= {n: gather(model, n, p.grad, ranks) for n, p in lora_parameters(model).items()}
            save_adapter(model, Path(output) / f"adapter{i}")
        results.append(result)
    return results
