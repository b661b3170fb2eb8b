"""What tests of scoring and attention weights run on 1 and 2 ranks: what a model makes of texts."""

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from tiny import PROMPTS

from llama import Llama, LlamaError
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.engine.attention_weights import attention_weights
from llama.parallel import initialize

SIZES = {"max_seq_len": 24, "max_batch_size": 3}


def compute(ckpt_dir: str) -> dict[str, Any]:
    place, rank = initialize(device="cpu", dtype=torch.float32), dist.get_rank()
    llama, checkpoint = Llama.build(ckpt_dir, device="cpu", dtype="float32", **SIZES), open_checkpoint(ckpt_dir)
    plain = load_model(checkpoint, replace(checkpoint.sizes, **SIZES), place)
    tokens = torch.arange(14).view(2, 7) * 5
    with torch.no_grad():
        result = {
            "scores": [asdict(found) for found in llama.score(PROMPTS, stride=5)],
            "embeddings": [llama.embed(PROMPTS[:2], pooling) for pooling in ("last", "mean")],
            "attention": [attention_weights(model, tokens, at) for model in (plain, llama.model) for at in (None, 0)],
            "hidden": [model(tokens, at, return_hidden=True) for model in (plain, llama.model) for at in (None, 0)],
            "refused": "",
        }
    try:
        llama.score(PROMPTS[:1] if rank == 0 else [""])
    except LlamaError as e:
        result["refused"] = str(e)
    logits, weights = attention_weights(plain, tokens)
    (logits.logsumexp(-1).sum() + weights[0].pow(2).sum()).backward()
    result["gradient"] = plain.layers[0].attention_norm.weight.grad
    return result
