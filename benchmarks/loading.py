"""Measures how fast a checkpoint of 2.5 GB is loaded, the first and the second time, and how much memory that takes.

    python -m benchmarks.loading [--directory DIR]      needs 2.5 GB of disk there while it runs

Prints a table: for each format and dtype, seconds and the peak private memory of one process. In the dtype of the files
the weights stay mapped: loading is quick and takes no private memory, and their first use reads them from disk.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama.checkpoints.hf_config_writing import config_of
from llama.checkpoints.huggingface import hf_name
from llama.checkpoints.meta import params_of
from llama.checkpoints.schema import tensor_shapes
from llama.model import ModelArgs

ARGS = ModelArgs(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=256, ffn_dim_multiplier=1.5
)
PROGRAM = Path(__file__).resolve().parent.parent / "tests" / "memory_program.py"


def write_checkpoint(root: Path, layout: str) -> Path:
    """Write random weights in bfloat16, with the sizes of Llama 3.2 1B but an output layer of its own."""
    directory = root / layout
    directory.mkdir()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_() for name, shape in tensor_shapes(ARGS).items()}
    if layout == "meta":
        torch.save(tensors, directory / "consolidated.00.pth")
        (directory / "params.json").write_text(json.dumps(params_of(ARGS)))
    else:
        save_file(
            {hf_name(n): t for n, t in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"}
        )
        (directory / "config.json").write_text(json.dumps(config_of(ARGS, {}, torch.bfloat16)))
    return directory


def measure_load(directory: Path, dtype: str) -> dict[str, float]:
    """Load a checkpoint in a new process: its "seconds", and the "peak" of its private memory in bytes."""
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent.parent)}
        program = (str(PROGRAM), f"{out}/r", "plain", dtype, str(directory))
        subprocess.run([sys.executable, *program], check=True, env=environment)
        return json.loads(Path(f"{out}/r.0").read_text())[0]


def drop_from_cache(directory: Path) -> None:
    """Ask the kernel to drop the files from its cache, so that the next load reads the disk."""
    for path in directory.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", help="where to write the checkpoints (default: the system's temporary directory)"
    )
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        print(f"{'layout':8}{'dtype':10}{'file':>9}{'first load':>12}{'second load':>13}{'peak private':>14}")
        for layout in ("meta", "hf"):
            directory = write_checkpoint(Path(root), layout)
            size = sum(path.stat().st_size for path in directory.iterdir())
            for dtype in ("bfloat16", "float32"):
                drop_from_cache(directory)
                first, second = measure_load(directory, dtype), measure_load(directory, dtype)
                print(
                    f"{layout:8}{dtype:10}{size / 1e9:6.2f} GB{first['seconds']:10.2f} s{second['seconds']:11.2f} s"
                    f"{second['peak'] / 1e9:11.2f} GB",
                    flush=True,
                )
            for path in directory.iterdir():
                path.unlink()


if __name__ == "__main__":
    main()
