"""What tests/test_ranks.py runs on 1, 2 and 4 ranks: builds a checkpoint's model and returns what it computes."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from tiny import PROMPTS
from torch.profiler import ProfilerActivity, profile

from llama import Llama, LlamaError, parallel
from llama.accelerate import accelerator
from llama.accelerate.kernels import cpu


def compute(ckpt_dir: str, model_parallel_size: int | None = None) -> dict[str, Any]:
    size = model_parallel_size
    llama = Llama.build(ckpt_dir, max_seq_len=128, model_parallel_size=size, device="cpu", dtype="float32")
    tokens = torch.arange(60).view(3, 20) * 3
    logits = llama.model(tokens)
    logits.logsumexp(-1).sum().backward()
    sampled = llama.text_completion(PROMPTS, temperature=1.0, max_gen_len=40, logprobs=True, echo=True)
    return {
        "logits": logits.tolist(),
        "norm_gradient": llama.model.norm.weight.grad.tolist(),  # type: ignore[union-attr]
        "greedy": [r["generation"] for r in llama.text_completion(PROMPTS, temperature=0, max_gen_len=40)],
        "sampled": [r["tokens"] for r in sampled],
        "logprobs": [r["logprobs"] for r in sampled],
        "read_by_rank_0": parallel.broadcast_object(f"rank {dist.get_rank()} of {dist.get_world_size()}"),
        "parameters": sum(t.numel() for t in llama.model.state_dict().values()),
    }


def unequal_work(ckpt_dir: str) -> list[str]:
    """The first data-parallel group asks three times, the second once and wrongly."""
    llama = Llama.build(ckpt_dir, model_parallel_size=1, device="cpu", dtype="float32")
    if dist.get_rank() == 0:
        return [llama.text_completion(["a"], temperature=0, max_gen_len=40)[0]["generation"] for _ in range(3)]
    try:
        llama.text_completion([""])
    except LlamaError as e:
        return [str(e)]
    return []


def collectives_of_two_steps(ckpt_dir: str, sockets: bool) -> dict[str, int]:
    """How often each collective is called, by its name."""
    if sockets:
        accelerator.share_memory = lambda: None
    llama = Llama.build(ckpt_dir, device="cpu", dtype="float32")
    stream = llama.stream([[1, 2, 3], [4]], 6, temperature=0)
    next(stream)
    calls: Counter[str] = Counter()
    run = cpu.CallList.__call__

    def counted(called: cpu.CallList) -> None:
        calls.update(call.name for call in called.calls if "of_ranks" in call.name)
        run(called)

    cpu.CallList.__call__ = counted  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        next(stream), next(stream)
    calls.update({event.key: event.count for event in seen.key_averages() if "c10d::" in event.key})
    return dict(calls)
