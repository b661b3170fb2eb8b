"""A rank takes the memory of its own shard, and little more: measured on a checkpoint of more than 1 GB."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import run_program

from llama.checkpoint import open_checkpoint
from llama.hf_config import config_of
from llama.hf_format import hf_name
from llama.layout import part_sizes, split_dim, tensor_shapes
from llama.meta_format import params_of
from llama.model import ModelArgs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what of its memory is private")

ARGS = ModelArgs(dim=2048, n_layers=8, n_heads=16, n_kv_heads=8, vocab_size=32000, multiple_of=256)
SHAPES = tensor_shapes(ARGS)
LARGEST = max(torch.Size(shape).numel() for shape in SHAPES.values())
ALLOWED = 300 * 10**6


def write_shards(directory: Path, shards: int) -> Path:
    """One set of tensors, written as often as there are shards: of their values, only that none repeats matters."""
    directory.mkdir()
    part = {}
    for name, shape in SHAPES.items():
        sizes = list(shape)
        dim = split_dim(name)
        if dim is not None:
            sizes[dim] //= shards
        part[name] = torch.full(sizes, len(part) / 128, dtype=torch.bfloat16)
    for rank in range(shards):
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params_of(ARGS)))
    return directory


def write_safetensors(directory: Path) -> Path:
    directory.mkdir()
    tensors = {hf_name(name): torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_of(ARGS, {}, torch.bfloat16)))
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("large")
    found = {f"{n} shards": write_shards(root / str(n), n) for n in (1, 2, 4)}
    found["safetensors"] = write_safetensors(root / "hf")
    size = sum(path.stat().st_size for path in found["1 shards"].iterdir())
    assert size > 10**9
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (2, "float32")])
def test_a_rank_takes_its_shard_and_a_tensor_more(
    directories: dict[str, Path], tmp_path: Path, ranks: int, dtype: str
) -> None:
    program = ("tests/memory_program.py", str(tmp_path / "out"), dtype, *map(str, directories.values()))
    done = run_program(*program, ranks=ranks if ranks > 1 else 0)
    assert done.returncode == 0, done.stderr
    itemsize = getattr(torch, dtype).itemsize
    for rank in range(ranks):
        results = json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text())
        for name, result in zip(directories, results, strict=True):
            assert result["shard"] == sum(part_sizes(ARGS, ranks).values()) * itemsize, "a rank holds its own share"
            assert result["peak"] <= result["shard"] + LARGEST * itemsize + ALLOWED, (name, rank)
            if (name, dtype) == (f"{ranks} shards", "bfloat16"):
                assert result["peak"] <= ALLOWED, "what is as it will be used stays mapped"


@pytest.mark.parametrize(("source", "to", "mp_size"), [("4 shards", "hf", 1), ("safetensors", "meta", 2)])
def test_converting_takes_next_to_no_memory(
    directories: dict[str, Path], tmp_path: Path, source: str, to: str, mp_size: int
) -> None:
    program = tmp_path / "convert.py"
    program.write_text(
        "import sys\n"
        "from llama.convert import convert\n"
        "from llama.measure import Peak\n"
        "with Peak() as peak:\n"
        "    convert(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))\n"
        "print(peak.private)\n"
    )
    done = run_program(str(program), str(directories[source]), str(tmp_path / "out"), to, str(mp_size))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= ALLOWED
    assert open_checkpoint(tmp_path / "out").format == to
    shutil.rmtree(tmp_path / "out")
