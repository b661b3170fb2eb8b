"""What tests/tasks/test_predict.py runs on 2 ranks: what heads on a checkpoint's network make of texts."""

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from tiny import PROMPTS
from torch import Tensor, nn

from llama import LlamaError, Transformer
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.task_spec import HeadConfig
from llama.engine.engine import Engine
from llama.parallel import initialize
from llama.tasks.predict import answer, classify, tag
from llama.tokenization.hf_tokenizer import open_tokenizer


class Own(nn.Module):
    """A random head on this project's network."""

    config = HeadConfig(("O", "B-X", "I-X"), "single_label_classification")

    def __init__(self, network: Transformer, outputs: int) -> None:
        super().__init__()
        self.network = network
        self.output = nn.Linear(network.params.dim, 3)
        nn.init.normal_(self.output.weight, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.output.bias)
        self.outputs = outputs

    def compute_logits(self, h: Tensor) -> Tensor:
        return self.output(h)[..., : self.outputs].float()


def results(ckpt_dir: str) -> dict[str, Any]:
    place = initialize(device="cpu", dtype=torch.float32)
    checkpoint = open_checkpoint(ckpt_dir)
    tokenizer = open_tokenizer(f"{ckpt_dir}/tokenizer.model")

    def open_engine(max_seq_len: int) -> Engine:
        args = replace(checkpoint.sizes, max_seq_len=max_seq_len, max_batch_size=3)
        return Engine(load_model(checkpoint, args, place), tokenizer, 1, 2048, None)

    whole, short = open_engine(60), open_engine(20)
    classifier, questions = Own(whole.model, 3), Own(short.model, 2)
    refused = ""
    try:
        classify(short, classifier, ["" if dist.get_rank() else "a"])
    except LlamaError as error:
        refused = str(error)
    spans, answers = tag(short, classifier, PROMPTS), answer(short, questions, *PROMPTS[1:3], doc_stride=7, n_best=3)
    return {
        "labels": [[asdict(one) for one in found] for found in classify(whole, classifier, PROMPTS)],
        "spans": [[asdict(one) for one in found] for found in spans],
        "answers": [asdict(one) for one in answers],
        "refused": refused,
    }
