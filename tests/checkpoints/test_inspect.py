"""What `python -m llama inspect` says of good directories, and of memory and options."""

import json
from collections.abc import Callable
from pathlib import Path

import inspected
import pytest
import torch
from inspected import MAKERS, SECOND, SHARD, change_json, inspect, report_of
from safetensors.torch import load_file, save_file
from tiny import ARGS, split_checkpoint, write_tokenizer

from llama import Llama, ModelArgs
from llama.checkpoints.families import FAMILIES, label_of
from llama.checkpoints.huggingface import SINGLE
from llama.checkpoints.inspect import report_on
from llama.checkpoints.loader import survey
from llama.checkpoints.report_text import human
from llama.checkpoints.schema import tensor_shapes
from llama.errors import LlamaError
from llama.rotary import RopeScaling

originals, copy = inspected.originals, inspected.copy

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
    llama.model(torch.tensor([[1, 2]]), 0)
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


# --- ranks, options and units ---------------------------------------------------------------------------------------


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
