"""What tests/engine/test_properties.py asks, and runs on 2 and 4 ranks: many cases, each answered by a fresh Llama.

Knows how to ask; knows neither what is asked nor what is right.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tiny import write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError, ModelArgs
from llama.engine.outputs import Completion
from llama.rotary import RopeScaling
from llama.session import Session

SIZES: dict[str, Any] = {"max_seq_len": 40, "max_batch_size": 6, "device": "cpu", "dtype": "float32"}
PLAIN = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32)  # 4 ranks share heads
SCALING = RopeScaling("dynamic", 2.0, original_max_position_embeddings=12)
MODELS = {
    "plain": PLAIN,
    "windowed": replace(PLAIN, sliding_window=7, sliding_layers=(1,)),
    "dynamic": replace(PLAIN, head_dim=8, qk_norm=True, rope_scaling=SCALING),  # heads too small for the kernels
}
DRAFT = "draft"
INTERRUPTION = [[5, 6]]


def write_models(directory: Path) -> Path:
    """Random weights of those sizes, and a draft: those of the first with some noise, so that it is right at times."""
    for name, args in MODELS.items():
        write_checkpoint(directory / name, args, endless=True)
    tensors = torch.load(write_checkpoint(directory / DRAFT, PLAIN, endless=True) / "consolidated.00.pth")
    chance = torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        tensor += 0.05 * tensor.std() * torch.randn(tensor.shape, generator=chance) if tensor.ndim > 1 else 0
    torch.save(tensors, directory / DRAFT / "consolidated.00.pth")
    return directory


def built(directory: Path) -> dict[str, Llama]:
    return {name: Llama.build(directory / name, **SIZES, draft_ckpt_dir=directory / DRAFT) for name in MODELS}


def fresh(llamas: Mapping[str, Llama], case: Mapping[str, Any]) -> Llama:
    """That was never asked anything, so that what is drawn without a seed depends on the case alone."""
    one = llamas[case["model"]]
    chunk, draft = case["prefill_chunk"], one.draft if case.get("draft") else None
    llama = Llama(one.model, one.tokenizer, prefill_chunk=chunk, draft=draft)
    llama.engine.stepper.runs_ahead = case.get("ahead", False)
    return llama


def counted_on(tokens: list[int], logits: Tensor) -> Tensor:
    """Favours the byte after the last one."""
    return logits.index_add(0, torch.tensor([(tokens[-1] + 1) % 256]), torch.tensor([5.0]))


def refusing(tokens: list[int], logits: Tensor) -> Tensor:
    """An error of the caller's own, in the midst of an answer."""
    if tokens[-1] % 8 == 0:
        raise LlamaError(f"no more after {tokens[-1]}")
    return logits


PROCESSORS = {"counted_on": counted_on, "refusing": refusing}


def called(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with functions in the place of their names."""
    found = dict(options)
    if "logits_processor" in found:
        found["logits_processor"] = PROCESSORS[found["logits_processor"]]
    if "rows" in found:
        found["rows"] = [own and called(own) for own in found["rows"]]
    return found


def described(completion: Completion) -> dict[str, Any]:
    """All of it but how many proposals were right: how many there are depends on the room that others leave."""
    return asdict(replace(completion, acceptance=None))


def completed(llama: Llama, case: Mapping[str, Any]) -> Any:
    found = llama.complete(case["prompts"], **called(case["options"]))
    return [described(one) for one in found]


def talked(llama: Llama, case: Mapping[str, Any]) -> Any:
    """Turns of a session, each of which keeps some of the talk; some are broken off, some interrupted by a call."""
    session, talk, found = Session(llama), [], []
    for turn in case["turns"]:
        talk = [*talk[: turn["kept"]], *turn["new"]][: SIZES["max_seq_len"]]
        stream = session.stream(talk, **called(turn["options"]))
        steps = [step for _, step in zip(range(turn["heard"]), stream, strict=False)]
        stream.close()
        if turn["interrupted"]:
            llama.complete(INTERRUPTION, 2)
        found.append({"prompt": talk, "steps": [asdict(step) for step in steps], "reused": session.reused})
        talk = talk + [step.token for step in steps]
    return found


def read(llama: Llama, case: Mapping[str, Any]) -> Any:
    """Scores of texts, and vectors of those that fit the window."""
    texts, most = case["texts"], SIZES["max_seq_len"]
    short = [text for text in texts if len(text.encode()) < most]
    scores = [asdict(one) for one in llama.score(texts, stride=case["stride"])]
    return scores, [llama.embed(short, pooling).tolist() for pooling in ("last", "mean") if short]


KINDS = {"complete": completed, "talk": talked, "read": read}


def answered(llamas: Mapping[str, Llama], case: Mapping[str, Any]) -> Any:
    """What a case comes to: numbers and texts only."""
    try:
        return KINDS[case["kind"]](fresh(llamas, case), case)
    except LlamaError as e:
        return {"refused": str(e).removeprefix("rank 0: ")}  # which alone calls what is the caller's own


def answer_all(directory: Path, cases: list[dict[str, Any]]) -> list[Any]:
    """By the models that `write_models` left in a directory."""
    llamas = built(directory)
    return [answered(llamas, case) for case in cases]
