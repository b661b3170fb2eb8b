"""A tiny random checkpoint in Meta's format, and programs run on several ranks: what many tests need.

The vocabulary is the 256 bytes, so that any text has known ids; weights are large enough for varied text.
"""

import base64
import os
import subprocess
import sys
from pathlib import Path

import torch

from llama import Llama, ModelArgs, Transformer, parallel
from llama.checkpoints.convert import convert
from llama.checkpoints.meta import save_checkpoint
from llama.checkpoints.schema import split_dim

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["hello there", "a", "the quick brown fox jumps over the lazy dog", "é漢字🙂"]
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=32)


def write_tokenizer(path: Path) -> None:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))


def write_checkpoint(directory: Path, args: ModelArgs = ARGS, endless: bool = False) -> Path:
    """A whole model as one shard, with its tokenizer. An endless one never prefers a control token."""
    parallel.initialize(device="cpu")
    model = Transformer(args)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    if endless:
        torch.nn.init.zeros_(model.output.weight.data[256:])
    save_checkpoint(directory, args, model.state_dict())
    write_tokenizer(directory / "tokenizer.model")
    return directory


def write_hf_checkpoint(folder: Path, endless: bool = False) -> Path:
    """As `write_checkpoint`, in Hugging Face's format."""
    convert(write_checkpoint(folder / "meta", ARGS, endless), folder / "hf", "hf")
    return folder / "hf"


def split_checkpoint(directory: Path, target: Path, shards: int) -> Path:
    """The checkpoint of one shard as Meta would publish it for `shards` GPUs."""
    target.mkdir(exist_ok=True)
    tensors = torch.load(directory / "consolidated.00.pth", weights_only=True)
    for name in ("params.json", "tokenizer.model"):
        (target / name).write_bytes((directory / name).read_bytes())
    for rank in range(shards):
        part = {}
        for name, tensor in tensors.items():
            dim = split_dim(name)
            part[name] = tensor if dim is None else tensor.chunk(shards, dim)[rank].clone()
        torch.save(part, target / f"consolidated.{rank:02d}.pth")
    return target


def greedy_by_hand(llama: Llama, prompt: list[int], steps: int) -> list[int]:
    """The slow plain version: a full forward over everything for every token, no cache."""
    tokens = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(llama.model(torch.tensor([tokens]))[0, -1].argmax())
        if token in llama.tokenizer.stop_tokens:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def launched(*command: str, ranks: int = 0) -> list[str]:
    """`python COMMAND...`, or the same under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, *command]


def environment() -> dict[str, str]:
    """Of a program that finds this project, and takes one of the few cores."""
    tests = [str(path) for path in (ROOT / "tests").iterdir() if path.is_dir()]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *tests])}


def run_program(*command: str, ranks: int = 0, timeout: float = 120, **options: object) -> subprocess.CompletedProcess:
    """Run `python COMMAND...` in the project's root; with `ranks`, under torchrun. Text in and out."""
    return subprocess.run(
        launched(*command, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
