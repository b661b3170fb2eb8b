"""What tests/tasks/test_predict.py runs on 2 ranks: what heads on a checkpoint's network make of texts."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tiny import PROMPTS
from torch import Tensor, nn

from llama import LlamaError, Transformer
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.task_spec import HeadConfig
from llama.parallel import initialize
from llama.tasks.predict import answer, classify, tag
from llama.tokenization.hf_tokenizer import open_tokenizer


class Own(nn.Module):
    """A random head of each kind on this project's network."""

    config = HeadConfig(("O", "B-X", "I-X"), "single_label_classification")

    def __init__(self, network: Transformer, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind
        self.output = nn.Linear(network.params.dim, 3)
        nn.init.normal_(self.output.weight, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> SimpleNamespace:
        logits = self.output(self.network.hidden_states(tokens, lengths=lengths)).float()  # (B, T, 3)
        if self.kind == "sequence":
            return SimpleNamespace(logits=logits[torch.arange(len(tokens)), lengths - 1])
        return SimpleNamespace(logits=logits, start_logits=logits[..., 0], end_logits=logits[..., 1])


def results(ckpt_dir: str) -> dict[str, Any]:
    place = initialize(device="cpu", dtype=torch.float32)
    checkpoint = open_checkpoint(ckpt_dir)
    network = load_model(checkpoint, checkpoint.sizes, place)
    tokenizer = open_tokenizer(f"{ckpt_dir}/tokenizer.model")
    sequence, token = Own(network, "sequence"), Own(network, "token")
    refused = ""
    try:
        classify(sequence, tokenizer, ["" if dist.get_rank() else "a"], 20, 2)
    except LlamaError as error:
        refused = str(error)
    return {
        "labels": [[asdict(one) for one in found] for found in classify(sequence, tokenizer, PROMPTS, 60, 3)],
        "spans": [[asdict(one) for one in found] for found in tag(token, tokenizer, PROMPTS, 20, 3)],
        "answers": [asdict(one) for one in answer(token, tokenizer, *PROMPTS[1:3], 20, 3, doc_stride=7, n_best=3)],
        "refused": refused,
    }
