"""What tests/test_ranks.py runs on 1, 2 and 4 ranks: builds a checkpoint's model and writes what it computes as JSON.

    torchrun --nproc_per_node N tests/rank_program.py CKPT_DIR OUTPUT [--model_parallel_size M]

Every rank writes OUTPUT.RANK, so that the test can see whether they agree.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import PROMPTS

from llama import Llama, parallel


def main(ckpt_dir: str, output: str, model_parallel_size: str | None = None) -> None:
    size = None if model_parallel_size is None else int(model_parallel_size)
    llama = Llama.build(ckpt_dir, max_seq_len=128, model_parallel_size=size, device="cpu", dtype="float32")
    tokens = torch.arange(60).view(3, 20) * 3
    logits = llama.model(tokens)
    logits.logsumexp(-1).sum().backward()
    sampled = llama.text_completion(PROMPTS, temperature=1.0, max_gen_len=40, logprobs=True, echo=True)
    result = {
        "logits": logits.tolist(),
        "norm_gradient": llama.model.norm.weight.grad.tolist(),  # type: ignore[union-attr]
        "greedy": [r["generation"] for r in llama.text_completion(PROMPTS, temperature=0, max_gen_len=40)],
        "sampled": [r["tokens"] for r in sampled],
        "logprobs": [r["logprobs"] for r in sampled],
        "read_by_rank_0": parallel.broadcast_object(f"rank {dist.get_rank()} of {dist.get_world_size()}"),
        "parameters": sum(t.numel() for t in llama.model.state_dict().values()),
    }
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
