"""What `python -m llama inspect` says of broken directories: each fault by name, and once."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import inspected
import pytest
import torch
from inspected import SECOND, SHARD, change_json, inspect, report_of
from safetensors.torch import load_file, save_file
from tiny import run_program

from llama.checkpoints.huggingface import INDEX, SINGLE
from llama.checkpoints.report_text import LISTED_MISFITS

originals, copy = inspected.originals, inspected.copy
HTML = b"<!DOCTYPE html><html>403</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

# --- directories in which something is wrong ------------------------------------------------------------------------


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def resize(name: str, by: int) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[:by] if by < 0 else data + bytes(by))

    return change


def params(**changes: object) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "params.json", **changes)


def config(**changes: object) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "config.json", **changes)


def shard_of(tensors: dict[str, torch.Tensor], name: str = SHARD) -> Callable[[Path], object]:
    """Replace tensors, or add some; an empty tensor deletes."""

    def change(directory: Path) -> None:
        found = {**torch.load(directory / name, weights_only=True), **tensors}
        torch.save(
            {name: tensor for name, tensor in found.items() if tensor.ndim == 0 or len(tensor)}, directory / name
        )

    return change


def safetensors_of(tensors: dict[str, torch.Tensor]) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        found = {**load_file(directory / SINGLE), **tensors}
        save_file({name: tensor for name, tensor in found.items() if len(tensor)}, directory / SINGLE)

    return change


def misplace(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    assert first != last and index["weight_map"]["model.embed_tokens.weight"] == first
    index["weight_map"]["model.embed_tokens.weight"] = last
    (directory / INDEX).write_text(json.dumps(index))


def no_index_and_a_shard_less(directory: Path) -> None:
    (directory / INDEX).unlink()
    (directory / INDEXED).unlink()


def more_words(directory: Path) -> None:
    with (directory / "tokenizer.model").open("ab") as f:
        f.write(b"aGVsbG8= 256\n")


def more_hf_words(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {token["content"]: token["id"] for token in values["added_tokens"]}
    values["model"]["vocab"] |= {f"word {i}": i for i in range(258, 513)}
    (directory / "tokenizer.json").write_text(json.dumps(values))


NONE = torch.zeros(0)
INDEXED = "model-00002-of-00005.safetensors"
# (layout, what is done to it, what a line about it says; the place DIR is the directory)
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated shard": ("meta of 4", resize(SECOND, -100), f"{SECOND} is truncated or damaged"),
    "empty shard": ("meta of 4", put(SECOND, b""), "the file is empty"),
    "HTML shard": ("meta of 4", put(SECOND, HTML), "it is an HTML or XML page of 31 bytes"),
    "LFS shard": ("meta of 4", put(SECOND, POINTER), f"it is a Git LFS pointer of {len(POINTER)} bytes"),
    "longer shard": ("meta of 4", resize(SECOND, 100), f"{SECOND} is 100 bytes longer than the archive"),
    "longer by one": ("meta of 4", resize(SECOND, 1), f"{SECOND} is 1 bytes longer than the archive"),
    "longer by far": ("meta of 4", resize(SECOND, 100000), f"{SECOND} is truncated or damaged"),
    "first shard missing": ("meta of 4", remove(SHARD), f"{SHARD} is missing beside 3 other shards"),
    "shard missing": ("meta of 4", remove(SECOND), f"{SECOND} is missing beside 3 other shards"),
    "last missing": ("meta of 4", remove("consolidated.03.pth"), "was split in 4 shards, but 3 are here"),
    "no params": ("meta", remove("params.json"), "params.json is missing"),
    "params no JSON": ("meta", put("params.json", HTML), "params.json is not JSON"),
    "params of no network": ("meta", params(n_heads=7), "params.json: dim = 64 cannot be divided by n_heads = 7"),
    "no words": (
        "meta",
        lambda d: (params(vocab_size=-1)(d), shard_of({"tok_embeddings.weight": NONE, "output.weight": NONE})(d)),
        "params.json: vocab_size is -1, and no tok_embeddings.weight or output.weight tells",
    ),
    "tensor missing": ("meta", shard_of({"norm.weight": NONE}), "missing norm.weight"),
    "tensor surplus": ("meta", shard_of({"extra.weight": torch.ones(2)}), "surplus extra.weight"),
    "tensor misshapen": ("meta", shard_of({"norm.weight": torch.ones(2)}), "norm.weight of shape (2,), expected (64,)"),
    "dtype unknown": (
        "meta",
        shard_of({"norm.weight": torch.ones(64, dtype=torch.int8)}),
        "norm.weight of torch.int8, expected one of bfloat16",
    ),
    "tensor in one shard only": (
        "meta of 4",
        shard_of({"layers.0.attention.wq.weight": NONE}, SECOND),
        "layers.0.attention.wq.weight is missing in 1 of 4 shards",
    ),
    "nothing in the shard": ("meta", lambda d: torch.save({}, d / SHARD), "missing tok_embeddings.weight"),
    "no tokenizer": ("meta", remove("tokenizer.model"), "tokenizer.model: no such file"),
    "HTML tokenizer": ("meta", put("tokenizer.model", HTML), "tokenizer.model: found a web page"),
    "more words": ("meta", more_words, "the model has vocab_size 512 and the tokenizer 513 words"),
    "truncated file": ("hf", resize(SINGLE, -100), f"{SINGLE} is truncated, damaged or no safetensors file"),
    "longer file": ("hf", resize(SINGLE, 100), f"{SINGLE} is truncated, damaged or no safetensors file"),
    "empty file": ("hf", put(SINGLE, b""), "the file is empty"),
    "HTML file": ("hf", put(SINGLE, HTML), "it is an HTML or XML page of 31 bytes"),
    "LFS file": ("hf indexed", put(INDEXED, POINTER), f"it is a Git LFS pointer of {len(POINTER)} bytes"),
    "file missing": ("hf indexed", remove(INDEXED), f"{INDEXED} is missing, which {INDEX} names"),
    "neither index nor all shards": ("hf indexed", no_index_and_a_shard_less, "4 of 5 shards are here, and no model"),
    "index no JSON": ("hf indexed", put(INDEX, b"{"), f"{INDEX} is not JSON"),
    "index of another model": ("hf indexed", misplace, f"has no model.embed_tokens.weight, where {INDEX}"),
    "no config": ("hf", remove("config.json"), "config.json is missing"),
    "other model": ("hf", config(model_type="gemma"), "config.json: model_type is 'gemma', expected one of"),
    "config of no network": ("hf", config(num_key_value_heads=3), "n_heads = 8 cannot be divided by n_kv_heads = 3"),
    "HF tensor missing": ("hf", safetensors_of({"model.norm.weight": NONE}), "missing model.norm.weight"),
    "HF tensor surplus": ("hf", safetensors_of({"extra.weight": torch.ones(2)}), "surplus extra.weight"),
    "HF tensor misshapen": (
        "hf",
        safetensors_of({"model.norm.weight": torch.ones(2)}),
        "model.norm.weight of shape (2,), expected (64,)",
    ),
    "no tokenizer.json": ("hf", remove("tokenizer.json"), "tokenizer.json"),
    "HTML tokenizer.json": ("hf", put("tokenizer.json", HTML), "tokenizer.json is not JSON"),
    "more HF words": ("hf", more_hf_words, "the model has vocab_size 512 and the tokenizer 513 words"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_once(copy: Callable[[str], Path], name: str) -> None:
    layout, spoil, message = FAULTS[name]
    directory = copy(layout)
    spoil(directory)
    status, text = inspect(directory)
    assert status == 1
    status, output = inspect(directory, "--json")
    found = json.loads(output)
    assert (status, found["ok"]) == (1, False)
    lines = found["problems"] + found["misfits"]
    expected = [line for line in lines if message in line]
    assert len(expected) == 1, lines
    assert lines == expected or name in ("nothing in the shard", "tensor in one shard only"), "nothing else is wrong"
    # In the text the line stands beside the file it is about, without the path, or below with it.
    of_files = [file for file in found["files"] if file["problem"] == expected[0]]
    paths = [f"{directory}/{file['name']}" for file in found["files"]]
    assert len(of_files) == any(expected[0].startswith((f"{path} ", f"{path}: ")) for path in paths)
    if of_files:
        (file,) = of_files
        rest = expected[0].removeprefix(f"{directory}/{file['name']}").lstrip(": ")
        (line,) = [line for line in text.splitlines() if rest in line]
        assert line.split()[0] in (file["name"], "files")
        assert f"{directory}/{file['name']}" not in text
        assert "\nproblems     1 of files, above\n" in text
    else:
        assert text.count(expected[0]) == 1
        assert all(line.endswith("  ok") for line in text.splitlines() if ".pth  " in line or ".safetensors  " in line)


def test_all_faults_are_named_at_once(copy: Callable[[str], Path]) -> None:
    directory = copy("meta of 4")
    put(SHARD, HTML)(directory)
    remove(SECOND)(directory)
    resize("consolidated.02.pth", -5)(directory)
    resize("consolidated.03.pth", 5)(directory)
    params(dim=None)(directory)
    remove("tokenizer.model")(directory)
    found = report_of(directory)
    assert [file.problem is None for file in found.files] == [False] * 3
    assert len(found.problems) == 6
    for part in ("dim is None", f"{SECOND} is missing", "HTML", "02.pth is truncated", "03.pth is 5 bytes", "no such"):
        assert sum(part in problem for problem in found.problems) == 1
    told = [file.problem for file in found.files]
    heading, *below = found.as_text().splitlines()[-4:]
    assert heading == "problems     3 of files, above"
    assert [line.strip() for line in below] == [problem for problem in found.problems if problem not in told]


def test_files_are_looked_at_beside_a_broken_index(copy: Callable[[str], Path]) -> None:
    for spoil in (remove(INDEX), put(INDEX, b"{")):
        directory = copy("hf indexed")
        spoil(directory)
        resize(INDEXED, -5)(directory)
        found = report_of(directory)
        broken = {file.name for file in found.files if file.problem is not None}
        assert INDEXED in broken and broken <= {INDEXED, SINGLE}
        assert len(found.problems) == 1 + (directory / INDEX).exists(), "the names tell which files belong together"
        assert found.memory is not None, "which config.json and the whole files tell"
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def test_tensors_in_whole_files_are_looked_at_beside_broken_ones(copy: Callable[[str], Path]) -> None:
    directory = copy("hf indexed")
    put(INDEXED, POINTER)(directory)
    config(num_key_value_heads=2)(directory)
    found = report_of(directory)
    assert found.misfits and all("of shape (32, 64), expected (16, 64)" in line for line in found.misfits)


def test_a_file_that_memory_cannot_map(copy: Callable[[str], Path]) -> None:
    directory = copy("hf")
    refusal = RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")
    with mock.patch("llama.checkpoints.hf_files.safe_open", side_effect=refusal):
        status, text = inspect(directory)
    assert status == 1
    assert "can't be mapped (unable to mmap 9 bytes from file <x>: Cannot allocate memory (12))" in text


def test_many_misfits_are_counted(copy: Callable[[str], Path]) -> None:
    directory = copy("meta")
    shard_of({f"extra.{i:02d}": torch.ones(1) for i in range(LISTED_MISFITS + 7)})(directory)
    status, text = inspect(directory)
    assert status == 1
    assert text.count("surplus extra.") == LISTED_MISFITS
    assert text.endswith("             and 7 more tensors that don't fit\n")
    assert len(report_of(directory).misfits) == LISTED_MISFITS + 7


def test_what_broken_files_leave_unknown(copy: Callable[[str], Path]) -> None:
    directory = copy("meta")
    put(SHARD, b"")(directory)
    status, text = inspect(directory)
    assert status == 1
    assert (
        text
        == f"""\
directory    {directory}
format       Meta
family       unknown
tensors      unknown
files        consolidated.00.pth      0 B  expected a file written by torch.save; the file is empty
tokenizer    tokenizer.model, a vocabulary of tiktoken's, 512 words
stop tokens  257 <|end_of_text|>, 265 <|eot_id|>
chat         Llama 3's format
memory       unknown
mp_size      unknown
problems     1 of files, above
"""
    )


def test_names_of_files_steer_no_terminal(copy: Callable[[str], Path]) -> None:
    directory = copy("hf")
    name = "evil\x1b[31m\x07\n\u202e\udcff.safetensors"
    (directory / SINGLE).rename(directory / name)
    status, text = inspect(directory)
    assert status == 1
    assert not set(text) & set("\x1b\x07\u202e\udcff")
    assert "evil\ufffd[31m\ufffd\ufffd\ufffd\ufffd.safetensors" in text
    status, output = inspect(directory, "--json")
    assert output.isascii() and "\x1b" not in output
    assert name in [file["name"] for file in json.loads(output)["files"]]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_program_ends_with_0_and_1(copy: Callable[[str], Path]) -> None:
    directory = copy("meta")
    good = run_program("-m", "llama", "inspect", str(directory))
    assert (good.returncode, good.stderr, good.stdout) == (0, "", report_of(directory).as_text() + "\n")
    resize(SHARD, -1)(directory)
    bad = run_program("-m", "llama", "inspect", str(directory), "--json")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert json.loads(bad.stdout)["ok"] is False


@pytest.mark.slow
def test_no_checkpoint_at_all_is_an_error_of_one_line(tmp_path: Path) -> None:
    for options in ([], ["--json"]):
        done = run_program("-m", "llama", "inspect", str(tmp_path), *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: DIR ") and len(done.stderr.splitlines()) == 1
