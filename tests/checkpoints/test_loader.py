"""Good files are loaded; bad ones are refused in one line that names the file, what was found, and what to do."""

import json
import os
import pickle
import re
import select
import subprocess
import sys
import termios
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ARGS, ROOT, environment, launched, run_program, split_checkpoint, write_checkpoint, write_tokenizer

from llama import Llama, LlamaError, ModelArgs, Transformer
from llama.checkpoints.meta import save_checkpoint
from llama.checkpoints.schema import SPLIT_DIM, memory_needed
from llama.parallel import Place

SHARD = "consolidated.00.pth"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt")


def build(directory: Path, **options: object) -> Llama:
    return Llama.build(directory, **{"device": "cpu", "dtype": "float32", "max_seq_len": 64, **options})  # type: ignore[arg-type]


def change_params(directory: Path, **changes: object) -> None:
    path = directory / "params.json"
    params = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in params.items() if v != "drop"}))


def change_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = torch.load(directory / SHARD, weights_only=True)
    change(tensors)
    torch.save(tensors, directory / SHARD)


def refusal(directory: Path, **options: object) -> str:
    with pytest.raises(LlamaError) as error:
        build(directory, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_weights_arrive_bit_for_bit_and_stay_mapped(directory: Path) -> None:
    stored = torch.load(directory / SHARD, weights_only=True)
    model = build(directory).model
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    if sys.platform == "linux":  # which says what a process has mapped
        assert str(directory / SHARD) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_is_converted_as_asked(directory: Path, name: object, dtype: torch.dtype) -> None:
    llama = build(directory, dtype=name)
    assert {p.dtype for p in llama.model.parameters()} == {dtype}
    llama.text_completion(["hello"], max_gen_len=2)
    assert llama.model.kv_cache.caches(llama.model.layers[0].attention, torch.empty(0))[0].dtype == dtype
    assert llama.model.freqs_cis is not None and llama.model.freqs_cis.dtype == torch.complex64


def test_rope_freqs_alone_are_ignored(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({"rope.freqs": torch.zeros(4)}))
    build(directory)


def test_vocab_size_may_be_left_to_the_tokenizer(directory: Path) -> None:
    change_params(directory, vocab_size=-1)
    assert build(directory).model.vocab_size == 512


def test_another_tokenizer_path_wins(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.model").rename(tmp_path / "moved.model")
    assert "tokenizer.model: no such file" in refusal(directory)
    build(directory, tokenizer_path=tmp_path / "moved.model")


def test_no_directory(tmp_path: Path) -> None:
    assert "found nothing there, expected a directory" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "found a file there" in refusal(tmp_path / "file")


def test_no_path_at_all() -> None:
    with pytest.raises(LlamaError, match="ckpt_dir is None, expected the path"):
        Llama.build(None)  # type: ignore[arg-type]


def test_links_to_nowhere_and_directories_in_place_of_files(directory: Path) -> None:
    (directory / SHARD).rename(directory / "moved")
    (directory / SHARD).symlink_to(directory / "none")
    assert f"{SHARD} can't be read (No such file or directory)" in refusal(directory)
    (directory / SHARD).unlink()
    (directory / SHARD).mkdir()
    assert f"{SHARD} can't be read (Is a directory)" in refusal(directory)


def test_no_checkpoint_in_it_lists_what_is(tmp_path: Path) -> None:
    assert "found an empty directory" in refusal(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "or config.json and model.safetensors, found model.gguf" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "drop"}, "missing key dim"),
        ({"n_layers": "drop", "n_heads": "drop"}, "missing key n_layers, n_heads"),
        ({"dimm": 3}, "unknown key dimm"),
        ({"max_seq_len": 64}, "unknown key max_seq_len"),
        ({"dim": "64"}, "dim is '64', expected a positive number"),
        ({"dim": 64.5}, "dim is 64.5"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": None}, "n_heads is None"),
        ({"norm_eps": True}, "norm_eps is True"),
        ({"n_heads": 7}, "dim = 64 cannot be divided by n_heads = 7"),
        ({"n_kv_heads": 3}, "n_heads = 8 cannot be divided by n_kv_heads = 3"),
        ({"vocab_size": 600}, "tok_embeddings.weight of shape (512, 64), expected (600, 64)"),
        ({"dim": 128}, "tok_embeddings.weight of shape (512, 64), expected (512, 128)"),
        ({"n_layers": 1}, "surplus layers.1.attention.wq.weight"),
        ({"n_layers": 3}, "missing layers.2.attention.wq.weight"),
    ],
)
def test_params_that_do_not_fit(directory: Path, changes: dict, message: str) -> None:
    change_params(directory, **changes)
    assert message in refusal(directory)


def test_params_missing_or_no_json(directory: Path) -> None:
    path = directory / "params.json"
    for content, message in (
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"<html>no</html>", "it is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"[1, 2]", "expected a JSON object of model sizes, found a list"),
    ):
        path.write_bytes(content)
        assert message in refusal(directory)
    path.unlink()
    assert "params.json is missing" in refusal(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>403</html>", "it is an HTML or XML page of 31 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"\x00" * 100, "it has 100 bytes"),
    ],
)
def test_something_else_in_place_of_a_shard(directory: Path, content: bytes, message: str) -> None:
    (directory / SHARD).write_bytes(content)
    assert message in refusal(directory)
    assert SHARD in refusal(directory)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_truncated_shard(directory: Path, part: float) -> None:
    data = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(data[: int(len(data) * part)])
    assert "is truncated or damaged" in refusal(directory)


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"norm.weight": Evil(mark)}, directory / SHARD)
    assert "its pickle holds more than tensors" in refusal(directory)
    (directory / SHARD).write_bytes(pickle.dumps(Evil(mark)))
    assert "expected a file written by torch.save" in refusal(directory)
    assert not mark.exists()


def test_a_zip_of_something_else(directory: Path) -> None:
    with zipfile.ZipFile(directory / SHARD, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "is truncated or damaged" in refusal(directory)
    torch.save([1, 2, 3], directory / SHARD)
    assert "expected a dictionary of tensors, found a list" in refusal(directory)


def test_tensors_that_do_not_fit_are_listed(directory: Path) -> None:
    def spoil(tensors: dict) -> None:
        del tensors["norm.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["layers.0.attention.wk.weight"] = torch.zeros(2, 64)
        tensors["output.weight"] = tensors["output.weight"].to(torch.int8)

    change_tensors(directory, spoil)
    message = refusal(directory)
    for part in (
        "missing norm.weight",
        "surplus extra.weight",
        "layers.0.attention.wk.weight of shape (2, 64), expected (32, 64)",
        "output.weight of torch.int8, expected one of bfloat16",
    ):
        assert part in message


def test_a_shard_is_missing(directory: Path) -> None:
    split_checkpoint(directory, directory, 4)
    (directory / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth is missing" in refusal(directory)


def test_all_shards_but_the_first_are_missing(directory: Path) -> None:
    split_checkpoint(directory, directory, 4)
    for rank in (1, 2, 3):
        (directory / f"consolidated.{rank:02d}.pth").unlink()
    message = refusal(directory)
    assert "was split in 4 shards, but 1 is here" in message


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_memory_is_computed_exactly(place: Place, n_kv_heads: int | None) -> None:
    args = ModelArgs(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, vocab_size=300, multiple_of=32, max_batch_size=3
    )
    model = Transformer(args)
    model(torch.zeros(1, 1, dtype=torch.long), 0)
    weights, cache = memory_needed(args, 1, torch.float32)
    assert weights == sum(p.nbytes for p in model.parameters())
    assert cache == sum(b.nbytes for b in model.buffers())


def test_what_cannot_fit_is_refused_with_the_arithmetic(directory: Path) -> None:
    message = refusal(directory, max_batch_size=10**6, max_seq_len=10**6)
    assert "GB of weights + " in message
    assert "max_batch_size=1000000 x max_seq_len=1000000" in message
    weights, cache, total = (float(n) for n in re.findall(r"([\d.]+) GB (?:of|do)", message))
    assert total == pytest.approx(weights + cache, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_batch_size": "4"}, "max_batch_size is '4'"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"model_parallel_size": 2}, "start with torchrun --nproc_per_node 2"),
        ({"model_parallel_size": 0}, "model_parallel_size is 0"),
        ({"model_parallel_size": "2"}, "model_parallel_size is '2'"),
        ({"device": 1.5}, "device 1.5 is not known"),
    ],
)
def test_options_of_build(directory: Path, options: dict, message: str) -> None:
    assert message in refusal(directory, **options)


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    class Unpicklable:
        def __reduce__(self) -> tuple:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(tmp_path, ARGS, {"norm.weight": Unpicklable()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_building_changes_nothing_global(directory: Path) -> None:
    before = (torch.get_default_dtype(), torch.get_default_device(), sys.stdout, torch.get_rng_state().tolist())
    build(directory).text_completion(["hello"], max_gen_len=3)
    after = (torch.get_default_dtype(), torch.get_default_device(), sys.stdout, torch.get_rng_state().tolist())
    assert before == after


def test_every_divided_matrix_is_one_of_the_networks(place: Place) -> None:
    names = {name.removesuffix(".weight").rpartition(".")[2] for name in Transformer(ARGS).state_dict()}
    assert names - SPLIT_DIM.keys() == {"attention_norm", "ffn_norm", "norm"}
    assert SPLIT_DIM.keys() <= names


def test_a_tokenizer_of_another_model(directory: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other.model")
    with (tmp_path / "other.model").open("ab") as f:
        f.write(b"aGVsbG8= 256\n")
    assert "vocab_size 512 and the tokenizer 513 words" in refusal(directory, tokenizer_path=tmp_path / "other.model")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_slow_load_shows_a_bar_on_a_terminal_alone_and_once(directory: Path, tmp_path: Path, ranks: int) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        "from llama import Llama\n"
        "from llama.checkpoints import loader\n"
        "from llama.checkpoints.schema import Stored\n"
        "from llama._util import console\n"
        "console.SECONDS_BEFORE_BAR = 0.2\n"
        "class Slow(Stored):\n"
        "    def part(self, *arguments):\n"
        "        time.sleep(0.05)\n"
        "        return super().part(*arguments)\n"
        "plain_survey = loader.survey\n"
        "def survey(*arguments, **options):\n"
        "    checkpoint = plain_survey(*arguments, **options)\n"
        "    tensors = checkpoint.tensors.items()\n"
        "    checkpoint.tensors = {n: Slow(t.name, t.pieces, t.dim, t.hf_head_dim) for n, t in tensors}\n"
        "    return checkpoint\n"
        "loader.survey = survey\n"
        "Llama.build(sys.argv[1], device='cpu')\n"
    )
    assert run_program(str(program), str(directory), ranks=ranks).stderr.count("loading:") == 0
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = launched(str(program), str(directory), ranks=ranks)
    subprocess.run(command, stderr=slave, env=environment(), cwd=ROOT, check=True, timeout=120)
    os.set_blocking(master, False)
    shown = b"".join(iter(lambda: os.read(master, 1 << 16) if select.select([master], [], [], 1)[0] else b"", b""))
    assert re.search(rb"loading: .*B/s", shown)
    assert max(map(int, re.findall(rb"loading: +(\d+)%", shown))) == 100
    assert shown.count(b"\n") == 1, "one rank shows it"
