"""`python -m llama inspect` reads the headers of files only, however large the files are."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inspected import write_hf_tokenizer
from tiny import run_program, write_tokenizer

from llama import ModelArgs
from llama.checkpoints.huggingface import INDEX, hf_name
from llama.checkpoints.meta import params_of
from llama.checkpoints.schema import split_dim, tensor_shapes

# What the process holds at most, mapped pages of files included, and what it has read by calls.
PROGRAM = """
import sys
import torch.distributed
import llama.cli.commands
from llama.checkpoints.loader import survey
from llama.checkpoints.inspect import report_on

def peak():
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM"))

def read():
    with open("/proc/self/io") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("rchar"))

before = peak(), read()
report = report_on(survey(sys.argv[1]))
assert not torch.distributed.is_initialized()
print(report.ok, sum(file.bytes for file in report.files), report.parameters, peak() - before[0], read() - before[1])
"""
BIG = {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}


def write_sparse_safetensors(directory: Path, args: ModelArgs) -> None:
    """A file for each layer, and one for the rest."""
    shapes = tensor_shapes(args)
    places = {name: f"{name.split('.')[1] if name.startswith('layers.') else 'rest'}.safetensors" for name in shapes}
    for place in set(places.values()):
        header: dict[str, dict] = {}
        end = 0
        for name in (name for name in shapes if places[name] == place):
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[hf_name(name)] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (directory / place).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
    (directory / INDEX).write_text(json.dumps({"weight_map": {hf_name(name): p for name, p in places.items()}}))
    sizes = {"hidden_size": args.dim, "intermediate_size": args.hidden_dim, "num_hidden_layers": args.n_layers}
    heads = {"num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads}
    values = {"model_type": "llama", "vocab_size": args.vocab_size, "tie_word_embeddings": False, **sizes, **heads}
    (directory / "config.json").write_text(json.dumps(values))
    write_hf_tokenizer(directory)


def write_sparse_shards(directory: Path, args: ModelArgs) -> None:
    """Four shards, as Meta would publish them; the numbers take no memory here, and no room in the files."""
    for rank in range(4):
        part = {}
        for name, shape in tensor_shapes(args).items():
            dim, rest = split_dim(name), list(shape)
            if dim is not None:
                rest[dim] //= 4
            part[name] = torch.empty(rest, dtype=torch.bfloat16)
        with torch.serialization.skip_data():
            torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params_of(args)))
    write_tokenizer(directory / "tokenizer.model")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
@pytest.mark.parametrize(
    ("write", "args", "least"),
    [
        (write_sparse_safetensors, ModelArgs(**BIG, n_layers=24, vocab_size=128256), 40e9),
        (write_sparse_shards, ModelArgs(**BIG, n_layers=6, vocab_size=512, tied_embeddings=True), 10e9),
    ],
    ids=["safetensors", "pth"],
)
@pytest.mark.slow
def test_large_files_are_not_read(
    tmp_path: Path, write: Callable[[Path, ModelArgs], None], args: ModelArgs, least: float
) -> None:
    write(tmp_path, args)
    done = run_program("-c", PROGRAM, str(tmp_path))
    assert done.returncode == 0, done.stderr
    ok, total, parameters, memory, read = done.stdout.split()
    assert (ok, int(parameters)) == ("True", sum(torch.Size(s).numel() for s in tensor_shapes(args).values()))
    assert int(total) > least
    assert int(memory) < 150e6
    assert int(read) < 50e6  # much of it Python's modules
