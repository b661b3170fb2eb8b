"""What `python -m llama inspect` says of good directories and of broken ones, and that it reads headers only."""

import contextlib
import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARGS, run_program, split_checkpoint, write_checkpoint, write_tokenizer

from llama import Llama, ModelArgs
from llama.checkpoints.families import FAMILIES, label_of
from llama.checkpoints.huggingface import INDEX, SINGLE, hf_name
from llama.checkpoints.inspect import LISTED_MISFITS, CheckpointReport, human, report_on
from llama.checkpoints.loader import survey
from llama.checkpoints.meta import params_of
from llama.checkpoints.schema import split_dim, tensor_shapes
from llama.cli.commands import parse
from llama.errors import LlamaError
from llama.rotary import RopeScaling

HTML = b"<!DOCTYPE html><html>403</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
SHARD, SECOND = "consolidated.00.pth", "consolidated.01.pth"


# --- directories ----------------------------------------------------------------------------------------------------


def write_hf_tokenizer(directory: Path) -> None:
    """The 256 bytes and two control tokens, as a tokenizer.json with its settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_hf(directory: Path, max_shard_size: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size=max_shard_size)
    write_hf_tokenizer(directory)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "meta": write_checkpoint,
    "meta of 4": lambda directory: split_checkpoint(write_checkpoint(directory.parent / "whole"), directory, 4),
    "hf": lambda directory: write_hf(directory, "1GB"),
    "hf indexed": lambda directory: write_hf(directory, "100KB"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: make(tmp_path_factory.mktemp("made") / "ckpt") for layout, make in MAKERS.items()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a good directory of that layout, for a test to break."""

    def of(layout: str) -> Path:
        target = tmp_path / "ckpt"
        target.mkdir()
        for path in originals[layout].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return of


def inspect(*arguments: object) -> tuple[int, str]:
    """(exit status, standard output) of the command, in this process."""
    stdout = io.StringIO()
    with mock.patch.object(sys, "argv", ["llama", "inspect", *map(str, arguments)]), contextlib.redirect_stdout(stdout):
        options = parse()
        try:
            options.run(options)
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code, stdout.getvalue()
    return 0, stdout.getvalue()


def report_of(directory: Path) -> CheckpointReport:
    return report_on(survey(directory))


# --- directories in which all is well -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", MAKERS)
def test_a_good_directory(originals: dict[str, Path], layout: str) -> None:
    directory = originals[layout]
    status, text = inspect(directory)
    assert status == 0
    assert text.endswith("problems     none\n")
    status, output = inspect(directory, "--json")
    found = json.loads(output)
    meta = layout.startswith("meta")
    assert (status, found["ok"], found["problems"], found["misfits"]) == (0, True, [], [])
    assert (found["directory"], found["format"]) == (str(directory), "meta" if meta else "hf")
    assert found["family"] == ("Llama 3" if meta else "Llama 1 or 2")
    names = sorted(path.name for path in directory.iterdir() if path.suffix in (".pth", ".safetensors"))
    assert len(names) == 4 if layout == "meta of 4" else len(names) > 2 if layout == "hf indexed" else len(names) == 1
    assert found["files"] == [
        {"name": name, "bytes": (directory / name).stat().st_size, "problem": None} for name in names
    ]
    assert found["sizes"]["hidden_dim"] == (192 if meta else 96)
    assert found["sizes"]["n_kv_heads"] == 4 and found["sizes"]["head_dim"] == 8
    assert found["dtypes"] == {"float32": 2 * 9 + 3}
    assert found["mp_sizes"] == [1, 2, 4, 8]
    name, kind, words = ("tokenizer.model", "tiktoken", 512) if meta else ("tokenizer.json", "tokenizers", 258)
    end, turn = {"id": 257, "name": "<|end_of_text|>"}, {"id": 265, "name": "<|eot_id|>"}
    stops = [end, turn] if meta else [{"id": 257, "name": "<|end|>"}]
    chat = "llama3" if meta else "template"
    assert found["tokenizer"] == {
        "file": name, "kind": kind, "n_words": words, "stop_tokens": stops, "chat": chat,
    }  # fmt: skip


def test_the_whole_text(originals: dict[str, Path]) -> None:
    status, text = inspect(originals["meta of 4"], "--mp_size", 2, "--dtype", "bf16", "--max_seq_len", 1000)
    assert status == 0
    assert (
        text
        == f"""\
directory    {originals["meta of 4"]}
format       Meta
family       Llama 3
sizes        dim 64, n_layers 2, n_heads 8, n_kv_heads 4, head_dim 8, hidden_dim 192, vocab_size 512
rotary       theta 500000, no scaling
parameters   164,160
tensors      21 of float32
files        consolidated.00.pth  {human((originals["meta of 4"] / SHARD).stat().st_size):>7}  ok
             consolidated.01.pth  {human((originals["meta of 4"] / SECOND).stat().st_size):>7}  ok
             consolidated.02.pth  {human((originals["meta of 4"] / SECOND).stat().st_size):>7}  ok
             consolidated.03.pth  {human((originals["meta of 4"] / SECOND).stat().st_size):>7}  ok
tokenizer    tokenizer.model, a vocabulary of tiktoken's, 512 words
stop tokens  257 <|end_of_text|>, 265 <|eot_id|>
chat         Llama 3's format
memory       bfloat16, mp_size 2, max_seq_len 1000, max_batch_size 4:
             one rank      164 kB weights +  512 kB KV cache =  676 kB
             all 2 ranks   329 kB weights + 1.02 MB KV cache = 1.35 MB
mp_size      1, 2, 4, 8
problems     none
"""
    )


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("SequenceClassification", 2, "classify, 2 labels: LABEL_0, LABEL_1"),
        ("TokenClassification", 1, "tag, 1 label: LABEL_0"),
        ("TokenClassification", 9, f"tag, 9 labels: {', '.join(f'LABEL_{i}' for i in range(8))}, ..."),
        ("QuestionAnswering", 2, "answer"),
    ],
)
def test_a_task_head(task: str, labels: int, said: str, tmp_path: Path) -> None:
    """Its labels and its own parameters are reported; it has no output layer that could be tied, and no KV cache."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_labels=labels, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"LlamaFor{task}")(config)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    status, text = inspect(tmp_path)
    assert status == 0 and f"\ntask         {said}\n" in text and "tied" not in text
    assert "  0 B KV cache" in text and text.endswith("problems     none\n")
    report = report_of(tmp_path)
    assert report.parameters == sum(weight.numel() for weight in model.parameters())
    assert report.dtypes == {"float32": len(list(model.parameters()))}
    assert report.labels == ([] if said == "answer" else [f"LABEL_{i}" for i in range(labels)])
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace(f"LlamaFor{task}", "LlamaForX")
    )
    assert inspect(tmp_path)[0] == 1 and report_of(tmp_path).task == "language"


def test_files_in_original_are_found_there(originals: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    split_checkpoint(originals["meta"], tmp_path / "original", 2)
    status, output = inspect(tmp_path, "--json")
    assert (status, json.loads(output)["directory"]) == (0, str(tmp_path / "original"))


@pytest.mark.parametrize("layout", MAKERS)
def test_memory_is_what_a_built_model_takes(originals: dict[str, Path], layout: str) -> None:
    options = {"max_seq_len": 48, "max_batch_size": 3}
    llama = Llama.build(originals[layout], device="cpu", dtype="float32", **options)
    llama.generate([[1, 2]], max_gen_len=1)
    found = report_on(survey(originals[layout]), **options)
    tensors = llama.model.state_dict().values()
    caches = [c for layer in llama.model.layers for c in (layer.attention.cache_k, layer.attention.cache_v)]
    assert found.memory is not None and found.memory.dtype == "float32"
    assert found.parameters == sum(t.numel() for t in tensors)
    assert found.memory.weights == found.memory.weights_in_all == sum(t.nbytes for t in tensors)
    assert found.memory.kv_cache == found.memory.kv_cache_in_all == sum(c.nbytes for c in caches)


def test_defaults_are_those_of_build(originals: dict[str, Path]) -> None:
    status, output = inspect(originals["meta"], "--json")
    memory = json.loads(output)["memory"]
    assert (status, memory["max_seq_len"], memory["max_batch_size"], memory["mp_size"]) == (0, 512, 4, 1)
    assert memory["dtype"] == "float32", "that of the files"
    shapes = tensor_shapes(ARGS)
    assert memory["weights"] == 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert memory["kv_cache"] == 4 * 2 * ARGS.n_layers * 4 * 512 * ARGS.kv_heads * ARGS.head_size


def test_ranks_share_what_is_divided(originals: dict[str, Path]) -> None:
    one, two = (report_on(survey(originals["hf"]), mp_size=size).memory for size in (1, 2))
    assert one is not None and two is not None
    norms = 4 * 64 * (2 * 2 + 1)
    assert 2 * (two.weights - norms) == one.weights - norms
    assert (2 * two.kv_cache, two.kv_cache_in_all) == (one.kv_cache, one.kv_cache)
    assert two.weights_in_all == 2 * two.weights == one.weights + norms


LLAMA3, LLAMA2 = ModelArgs(), ModelArgs(rope_theta=10000)


@pytest.mark.parametrize(
    ("args", "model_type", "family"),
    [
        (LLAMA3, None, "Llama 3"),
        (LLAMA2, "llama", "Llama 1 or 2"),
        (ModelArgs(rope_theta=1000000), "llama", "Llama"),
        (ModelArgs(rope_scaling=RopeScaling("llama3", 8)), None, "Llama 3.1 or 3.3"),
        (ModelArgs(rope_scaling=RopeScaling("llama3", 32)), "llama", "Llama 3.2"),
        (ModelArgs(rope_scaling=RopeScaling("linear", 8)), None, "Llama"),
        (ModelArgs(qkv_bias=True), None, "Qwen2 or 2.5"),
        (ModelArgs(qkv_bias=True, wo_bias=True), None, "Llama 3"),
        (ModelArgs(qk_norm=True), None, "Qwen3"),
        (ModelArgs(sliding_window=4096), None, "Mistral"),
        (LLAMA2, "mistral", "Mistral"),
        (LLAMA2, "qwen2", "Qwen2 or 2.5"),
        (LLAMA2, "qwen3", "Qwen3"),
    ],
)
def test_family(args: ModelArgs, model_type: str | None, family: str) -> None:
    assert label_of(args, FAMILIES.get(model_type or "")) == family


def test_what_not_every_model_has_is_told(copy: Callable[[str], Path]) -> None:
    directory = copy("hf")
    tensors = load_file(directory / SINGLE)
    del tensors["lm_head.weight"]
    for layer in range(2):
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(rows)
    save_file(tensors, directory / SINGLE)
    change_json(directory / "config.json", model_type="qwen2", tie_word_embeddings=True, use_sliding_window=True)
    change_json(directory / "config.json", sliding_window=16, max_window_layers=1, layer_types="drop")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000000.0}
    change_json(directory / "config.json", rope_parameters=scaling)
    status, text = inspect(directory)
    assert status == 0, text
    assert "family       Qwen2 or 2.5\n" in text
    assert "besides      qkv biases, tied embeddings, window of 16 positions in 1 of 2 layers\n" in text
    assert "rotary       theta 1000000, yarn scaling by 4 from 64 positions\n" in text


def test_a_tokenizer_without_template_and_end(copy: Callable[[str], Path]) -> None:
    directory = copy("hf")
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").unlink()
    change_json(directory / "config.json", eos_token_id="drop")
    status, text = inspect(directory)
    assert status == 0
    assert "stop tokens  none: answers end at their greatest length\nchat         no template\n" in text


# --- directories in which something is wrong ------------------------------------------------------------------------


def change_json(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


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


def more_words(directory: Path) -> None:
    with (directory / "tokenizer.model").open("ab") as f:
        f.write(b"aGVsbG8= 256\n")


def more_hf_words(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text())
    for i in range(258, 513):
        values["added_tokens"].append({**values["added_tokens"][0], "id": i, "content": f"<|{i}|>"})
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
    "no index": ("hf indexed", remove(INDEX), f"{SINGLE} is missing, and there is no {INDEX} that names others"),
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
        assert len(found.problems) == 2
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
    with mock.patch("llama.checkpoints.huggingface.safe_open", side_effect=refusal):
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


def test_ranks_that_cannot_be(originals: dict[str, Path]) -> None:
    status, text = inspect(originals["meta"], "--mp_size", 3)
    assert status == 1
    assert "memory       unknown\n" in text
    assert "can't be divided over 3 model-parallel ranks" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mp_size", 0], "mp_size is 0"),
        (["--max_seq_len", 0], "max_seq_len is 0"),
        (["--max_batch_size", -1], "max_batch_size is -1"),
        (["--dtype", "int8"], "dtype 'int8' is not known"),
    ],
)
def test_options_that_mean_nothing(originals: dict[str, Path], options: list, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        inspect(originals["meta"], *options)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (99960, "100 kB"),
        (999_499, "999 kB"), (999_500, "1.00 MB"), (16_060_522_240, "16.1 GB"), (812 * 10**9, "812 GB"),
        (10**13, "10.0 TB"),
    ],
)  # fmt: skip
def test_bytes_for_people(size: int, text: str) -> None:
    assert human(size) == text


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
        assert done.stderr.startswith("error: ckpt_dir ") and len(done.stderr.splitlines()) == 1


# --- headers only ---------------------------------------------------------------------------------------------------

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
