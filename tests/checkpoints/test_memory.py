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

from llama.accelerate.kernels import cpu
from llama.accelerate.memory_pages import mapped_ranges, release
from llama.bench.measure import status_bytes
from llama.checkpoints.hf_config_writing import config_of
from llama.checkpoints.huggingface import hf_name
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.meta import params_of
from llama.checkpoints.schema import part_sizes, split_dim, tensor_shapes
from llama.model import ModelArgs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what of its memory is private")

ARGS = ModelArgs(dim=2048, n_layers=8, n_heads=16, n_kv_heads=8, vocab_size=32000, multiple_of=256)
SHAPES = tensor_shapes(ARGS)
LARGEST = max(torch.Size(shape).numel() for shape in SHAPES.values())
ALLOWED = 300 * 10**6
FREED = 50 * 10**6  # that waits to be used again


def write_shards(directory: Path, shards: int) -> Path:
    """One set of tensors, written once for each shard; their values only have to differ from each other."""
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
@pytest.mark.slow
def test_a_rank_takes_its_shard_and_a_tensor_more(
    directories: dict[str, Path], tmp_path: Path, ranks: int, dtype: str
) -> None:
    program = ("tests/memory_program.py", str(tmp_path / "out"), "plain", dtype, *map(str, directories.values()))
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


@pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
@pytest.mark.parametrize(
    ("names", "dtype"), [(("1 shards", "safetensors"), "bfloat16"), (("1 shards",), "float32")], ids=["mapped", "cast"]
)
@pytest.mark.slow
def test_the_fast_form_is_packed_tensor_by_tensor(
    directories: dict[str, Path], tmp_path: Path, names: tuple[str, ...], dtype: str
) -> None:
    """Only the packed tensors are in memory: not the originals, nor pages of the file that were read to pack them."""
    paths = [str(directories[name]) for name in names]
    done = run_program("tests/memory_program.py", str(tmp_path / "out"), "fast", dtype, *paths)
    assert done.returncode == 0, done.stderr
    itemsize = getattr(torch, dtype).itemsize
    sizes = part_sizes(ARGS, 1)
    shard, embedding = sum(sizes.values()) * itemsize, sizes["tok_embeddings.weight"] * itemsize
    for name, result in zip(names, json.loads(Path(f"{tmp_path / 'out'}.0").read_text()), strict=True):
        taken = result["peak"] - result["before"]
        assert shard - embedding <= taken <= shard + LARGEST * itemsize + FREED, name
        if (name, dtype) == ("1 shards", "bfloat16"):
            assert taken <= shard - embedding + FREED
            assert result["resident"] <= shard - embedding + 2 * ALLOWED, "a file's pages are let go of"


def test_letting_go_takes_nothing_from_others(tmp_path: Path) -> None:
    """Pages of a file are released and read again; other memory, and pages that are only partly of a file, stay."""
    size = 1 << 26
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size // 256))
    mapped = torch.from_file(str(tmp_path / "file"), size=size, dtype=torch.uint8)
    own, total = mapped.clone(), int(mapped.sum(dtype=torch.int64))
    ranges, before = mapped_ranges(), status_bytes("RssFile")
    for tensor in (own, mapped[5000:9000], mapped[1:2], mapped[:0], mapped[-1:]):
        release(tensor, ranges)
    release(mapped, [])
    assert status_bytes("RssFile") > before - size / 2
    release(mapped, ranges)
    assert status_bytes("RssFile") < before - size / 2
    assert int(own.sum(dtype=torch.int64)) == int(mapped.sum(dtype=torch.int64)) == total


@pytest.mark.parametrize(("source", "to", "mp_size"), [("4 shards", "hf", 1), ("safetensors", "meta", 2)])
@pytest.mark.slow
def test_converting_takes_next_to_no_memory(
    directories: dict[str, Path], tmp_path: Path, source: str, to: str, mp_size: int
) -> None:
    program = tmp_path / "convert.py"
    program.write_text(
        "import sys\n"
        "from llama.checkpoints.convert import convert\n"
        "from llama.bench.measure import PeakMemory\n"
        "with PeakMemory() as peak:\n"
        "    convert(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))\n"
        "print(peak.private)\n"
    )
    done = run_program(str(program), str(directories[source]), str(tmp_path / "out"), to, str(mp_size))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= ALLOWED
    assert open_checkpoint(tmp_path / "out").format.name == to
    shutil.rmtree(tmp_path / "out")
