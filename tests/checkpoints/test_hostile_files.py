"""Files that are made to do harm, or that an accident has spoiled: each is named, and nothing is written elsewhere."""

import json
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import blobfile
import object_store
import pytest
import torch
from against_transformers import write_model
from object_store import URL, Store
from safetensors.torch import save_file
from tiny import write_checkpoint

from llama import Llama, LlamaError
from llama.checkpoints.convert import convert
from llama.checkpoints.download import copy_to_cache
from llama.checkpoints.huggingface import INDEX, SINGLE
from llama.checkpoints.inspect import inspect
from llama.checkpoints.loader import open_checkpoint, survey
from llama.checkpoints.meta import save_checkpoint

SHARD = "consolidated.00.pth"
SIZE = 128 << 20  # of what is compressed
store = object_store.store
PLACES = ["..", "../x", "/etc/x", "a/b", "..\\x", "C:\\x", "C:x", "", ".", "a\nb", "x" * 201]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hostile") / "meta")


@pytest.fixture
def meta(original: Path, tmp_path: Path) -> Path:
    (tmp_path / "ckpt").mkdir()
    for path in original.iterdir():
        (tmp_path / "ckpt" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "ckpt"


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    convert(original, tmp_path / "hf", "hf")
    return tmp_path / "hf"


def refusal(directory: Path, act: Callable[[Path], object] = open_checkpoint) -> str:
    with pytest.raises(LlamaError) as error:
        act(directory)
    assert str(error.value).isprintable()
    return str(error.value)


# --- archives ---------------------------------------------------------------------------------------------------------


def compress(path: Path, which: str, method: int = zipfile.ZIP_DEFLATED) -> None:
    """Write the archive anew, with the members whose names end so compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data, method if name.endswith(which) else zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    ("which", "method"), [("data/0", zipfile.ZIP_DEFLATED), ("data.pkl", zipfile.ZIP_DEFLATED), ("", zipfile.ZIP_LZMA)]
)
def test_compressed_members_are_refused_by_name(meta: Path, which: str, method: int) -> None:
    compress(meta / SHARD, which, method)
    message = refusal(meta)
    assert f"{SHARD}: '" in message and "is compressed" in message and "without compression" in message


def test_a_file_that_would_inflate_takes_no_memory(meta: Path) -> None:
    """128 MB of zeros in a few kB."""
    torch.save({"tok_embeddings.weight": torch.zeros(64)}, meta / SHARD)
    compress(meta / SHARD, "nothing")
    with zipfile.ZipFile(meta / SHARD, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/9", bytes(SIZE))
    assert (meta / SHARD).stat().st_size < 2 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "'archive/data/9' is compressed, " in refusal(meta) and str(SIZE) in refusal(meta)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < SIZE >> 12  # kB: a quarter of it


def test_an_archive_that_was_only_written_anew_is_read(meta: Path) -> None:
    expected = open_checkpoint(meta).tensors["norm.weight"].read().clone()
    compress(meta / SHARD, "nothing")
    message = None
    try:
        assert torch.equal(open_checkpoint(meta).tensors["norm.weight"].read(), expected)
    except LlamaError as e:  # torch wants members aligned, and says so
        message = str(e)
    assert message is None or SHARD in message


# --- cut off anywhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [SHARD, SINGLE])
def test_a_file_that_is_cut_off_anywhere_is_named(name: str, cuts: int, meta: Path, hf: Path) -> None:
    directory = meta if name == SHARD else hf
    data = (directory / name).read_bytes()
    edges = [*range(0, 12, 40 // cuts), *(len(data) - n for n in range(1, 30, 40 // cuts))]
    for length in {*edges, *(len(data) * i // cuts for i in range(cuts)), len(data) - 300, len(data) - 3000}:
        (directory / name).write_bytes(data[:length])
        assert name in refusal(directory), length
        assert not inspect(directory).ok
    (directory / name).write_bytes(data)
    open_checkpoint(directory)


@pytest.mark.parametrize("size", [0, 3, 24, 1000])
def test_only_a_gguf_file(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes((b"GGUF" + bytes(2000))[:size])
    assert "model.Q4_K_M.gguf" in refusal(tmp_path)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_an_index_names_files_beside_it_alone(hf: Path, name: str) -> None:
    (hf / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "expected names of files beside it" in refusal(hf)


@pytest.mark.parametrize("name", PLACES)
def test_names_in_a_store_write_nothing_elsewhere(
    store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = [*store.scandir(URL)]
    stat = real[0].stat
    hostile = SimpleNamespace(name=name, path=name, is_dir=False, is_file=True, stat=stat)
    monkeypatch.setattr(blobfile, "scandir", lambda url: [*real, hostile])
    monkeypatch.setattr(blobfile, "join", lambda *parts: "/".join(parts))
    monkeypatch.setattr(store, "path", lambda url: store.directory / "params.json")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    message = refusal(tmp_path, lambda directory: copy_to_cache(URL, directory / "cache"))
    assert f"{URL} has a file called " in message and "refused" in message
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the size of files gives the same errors as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kilobytes", [1, 20, 60, 150, 400])
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_full_disk_is_told_by_its_name_and_leaves_nothing(
    original: Path, hf: Path, to: str, kilobytes: int, tmp_path: Path
) -> None:
    source = hf if to == "meta" else original
    for target in (tmp_path / "new", tmp_path / "old"):
        if target.name == "old":
            target.mkdir()
        with largest_file(kilobytes << 10):
            message = refusal(target, lambda directory: convert(source, directory, to))
        assert str(target) in message and "File too large" in message and "enforce" not in message
        assert target.exists() == (target.name == "old") and not list(target.glob("*"))


def test_a_model_that_is_saved_on_a_full_disk(original: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(original)
    tensors = {name: stored.read() for name, stored in checkpoint.tensors.items()}
    with largest_file(10_000), pytest.raises((OSError, RuntimeError)):
        save_checkpoint(tmp_path / "out", checkpoint.sizes, tensors)
    assert not list((tmp_path / "out").iterdir())


def test_a_copy_that_fills_the_disk(store: Store, tmp_path: Path) -> None:
    with largest_file(10_000):
        message = refusal(tmp_path, lambda directory: copy_to_cache(URL, directory / "cache"))
    assert f"{SHARD} can't be written (File too large): make room in" in message
    assert not [path for path in (tmp_path / "cache").rglob("*") if "partial" in path.name or SHARD in path.name]


# --- what inspect lists -----------------------------------------------------------------------------------------------


def change_tokenizer(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "tokenizer.json"
    source = json.loads(path.read_text())
    change(source)
    path.write_text(json.dumps(source))


def test_two_words_of_one_id(hf: Path) -> None:
    assert inspect(hf).ok
    change_tokenizer(hf, lambda source: source["model"]["vocab"].update(b=source["model"]["vocab"]["a"]))
    (problem,) = [line for line in inspect(hf).problems if "both have the id" in line]
    assert f"{hf}/tokenizer.json: 'a' and 'b' both have the id 97" in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: source.pop("model"), "without a 'model'"),
        (lambda source: source.update(model=[]), "without a 'model'"),
        (lambda source: source["model"].update(vocab=[]), "no tokenizer could be made of it"),
        (lambda source: source["model"].pop("vocab"), "no tokenizer could be made of it"),
        (lambda source: source.update(added_tokens={"a": 1}), "'added_tokens' is dict"),
        (lambda source: source["added_tokens"].append({"id": 3}), "'added_tokens' has dict"),
        (lambda source: source["model"]["vocab"].update(zz=-1), "tokenizer.json"),
    ],
)
def test_an_odd_tokenizer_json(hf: Path, change: Callable[[dict], object], said: str) -> None:
    change_tokenizer(hf, change)
    report = inspect(hf)
    assert not report.ok and any(said in line for line in report.problems), report.problems


SIDE_FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", SIDE_FILES)
def test_links_to_nothing(hf: Path, name: str) -> None:
    (hf / name).unlink(missing_ok=True)
    (hf / name).symlink_to("../blobs/abc")
    found = [line for line in inspect(hf).problems if f"{name} is a link to ../blobs/abc, which isn't there" in line]
    assert len(found) == 1
    assert f"{name} is a link to" in refusal(hf, lambda directory: Llama.build(directory, device="cpu"))


def test_links_that_lead_somewhere_are_files(hf: Path, tmp_path: Path) -> None:
    """As in the cache of Hugging Face's hub."""
    (tmp_path / "blobs").mkdir()
    for path in list(hf.iterdir()):
        os.replace(path, tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert inspect(hf).ok


def test_recommended_settings_that_cannot_be(hf: Path) -> None:
    (hf / "generation_config.json").write_text('{"top_p": 7, "eos_token_id": 5}')
    (problem,) = inspect(hf).problems
    assert problem.startswith(f"{hf}/generation_config.json: top_p is 7, expected")


def test_files_of_other_sizes_take_no_memory(tmp_path: Path) -> None:
    """A tensor that claims to be larger than its file is refused by its file's name."""
    write_model(tmp_path, "llama")
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes().replace(b'"shape":[4]', b'"shape":[4000000000]')
    header = data[8 : data.index(b"}}") + 2]
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert SINGLE in survey(tmp_path).problems[0]
