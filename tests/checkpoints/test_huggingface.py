"""Hugging Face's directories: what a configuration means, what is harmless in one, and what is refused, by name.

tests/checkpoints/test_families.py compares logits; tests/checkpoints/test_inspect_faults.py has the broken files.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARGS, run_program, split_checkpoint, write_checkpoint, write_hf_checkpoint, write_tokenizer

from llama import Llama, LlamaError
from llama.checkpoints.convert import convert
from llama.checkpoints.huggingface import INDEX, SINGLE
from llama.checkpoints.loader import open_checkpoint, survey
from llama.checkpoints.meta import save_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


def change_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(LlamaError) as error:
        open_checkpoint(directory)
    message = str(error.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": []}, "model_type is [], expected one of"),
        ({"model_type": "drop", "architectures": "drop"}, "model_type is None"),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"hidden_size": "drop"}, "missing key hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected"),
        ({"num_hidden_layers": 10**6}, "no model"),
        ({"num_attention_heads": True}, "num_attention_heads is True, expected a whole number"),
        ({"intermediate_size": 1.5}, "intermediate_size is 1.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], expected a JSON object"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope_scaling type is 'longrope', expected",
        ),
        ({"rope_parameters": {"rope_type": "mrope", "mrope_section": [1]}, "rope_scaling": None}, "type is 'mrope'"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_scaling type is {}"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "factor '8', expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor 1e+300"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "has no low_freq_factor"),
        ({"rope_scaling": {**YARN, "beta_slow": 0}}, "beta_slow 0, expected a number of at least"),
        ({"rope_scaling": {**YARN, "attention_factor": 10**30}}, "attention_factor"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate 1, expected true or false"),
        ({"rope_scaling": {**YARN, "surprise": 1}}, "rope_scaling has surprise; known are"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full"]},
            "layer_types is ['full'], expected",
        ),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
    ],
)
def test_a_configuration_that_means_nothing_here_is_refused_by_name(
    directory: Path, changes: dict, message: str
) -> None:
    change_config(directory, **changes)
    assert message in refusal(directory)
    assert f"{directory}/config.json" in refusal(directory)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b", "\ud800", "a\n.safetensors", "", ".", "x" * 5000])
def test_an_index_names_files_beside_it(directory: Path, name: str) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "expected names of files beside it" in refusal(directory)
    assert survey(directory).problems


@pytest.mark.parametrize("places", [None, [], {}, {"model.norm.weight": 3}])
def test_an_index_of_odd_types(directory: Path, places: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert "weight_map is not an object of file names" in refusal(directory)


def test_a_tensor_in_two_files_is_told(directory: Path) -> None:
    names = list(load_file(directory / SINGLE))
    save_file({"model.norm.weight": torch.ones(64)}, directory / "second.safetensors")
    places = dict.fromkeys(names, SINGLE) | {"model.norm.weight": "second.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert "model.norm.weight is in 2 files" in refusal(directory)


def test_harmless_extras(directory: Path) -> None:
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(directory, lambda t: t.update({inverse: torch.ones(4)}))
    assert open_checkpoint(directory).sizes.tied_embeddings is False


@pytest.mark.parametrize("row", [None, 3, 511])
def test_an_output_layer_that_repeats_a_tied_embedding(directory: Path, row: int | None) -> None:
    """It is accepted if all rows are equal, and refused if a single row differs."""

    def repeat(tensors: dict) -> None:
        tensors["model.embed_tokens.weight"][0, 0] = float("nan")  # which is equal bit for bit
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if row is not None:
            tensors["lm_head.weight"][row] += 1

    change_config(directory, tie_word_embeddings=True)
    change_tensors(directory, repeat)
    if row is None:
        assert "output.weight" not in open_checkpoint(directory).tensors
    else:
        assert "lm_head.weight differs from the embedding" in refusal(directory)


def test_other_tensors_are_not_harmless(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    assert "surplus model.layers.0.self_attn.q_proj.bias" in refusal(directory)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.float64])
def test_dtypes_that_are_not_read(directory: Path, dtype: torch.dtype) -> None:
    change_tensors(directory, lambda t: t.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    assert f"model.norm.weight of {dtype}, expected one of bfloat16, float16, float32" in refusal(directory)


def test_files_of_the_older_form_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model*.bin is the older form" in refusal(tmp_path)


def test_the_original_folder_is_found_where_nothing_else_is_whole(directory: Path, tmp_path: Path) -> None:
    """As in a download of the `original/` folder alone, or with an index of files that were left out."""
    write_checkpoint(directory / "original")
    assert open_checkpoint(directory).directory == directory
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "absent.safetensors"}}))
    assert open_checkpoint(directory).directory == directory / "original"
    Llama.build(directory, device="cpu", dtype="float32")


def test_dtype_auto_is_that_of_the_files(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    assert {p.dtype for p in Llama.build(directory, device="cpu", dtype="auto").model.parameters()} == {torch.float16}


def test_a_tokenizer_path_wins_over_what_is_found(directory: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other.model")
    assert Llama.build(directory, device="cpu").tokenizer.bos_id == 256
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(LlamaError, match=r"tokenizer\.json"):
        Llama.build(directory, device="cpu")
    Llama.build(directory, tokenizer_path=tmp_path / "other.model", device="cpu")


def test_parameters_are_tensors_too(tmp_path: Path) -> None:
    """Of a program that saved `dict(model.named_parameters())`."""
    whole = write_checkpoint(tmp_path / "whole")
    source = split_checkpoint(whole, tmp_path / "split", 2)
    for shard in source.glob("*.pth"):
        tensors = torch.load(shard, weights_only=True)
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, shard)
    for rank_file in (source, whole):
        convert(rank_file, tmp_path / f"{rank_file.name} hf", "hf")
    assert (tmp_path / "split hf" / SINGLE).read_bytes() == (tmp_path / "whole hf" / SINGLE).read_bytes()


@pytest.mark.parametrize(("vocab_size", "theta"), [(32000, 10000.0), (128256, 500000.0), (32016, None)])
def test_a_theta_that_is_not_told(tmp_path: Path, vocab_size: int, theta: float | None) -> None:
    """Llama 1 and 2 had one base, Llama 3 another; for another vocabulary it is unknown."""
    args = ARGS.__class__(dim=16, n_layers=1, n_heads=2, vocab_size=vocab_size, multiple_of=16)
    write_checkpoint(tmp_path, args)
    params = json.loads((tmp_path / "params.json").read_text())
    del params["rope_theta"], params["vocab_size"]
    (tmp_path / "params.json").write_text(json.dumps(params))
    if theta is None:
        assert "params.json: missing key rope_theta" in refusal(tmp_path)
    else:
        sizes = open_checkpoint(tmp_path).sizes
        assert (sizes.rope_theta, sizes.vocab_size) == (theta, vocab_size)


def test_looking_reads_no_matrix_whole(tmp_path: Path) -> None:
    """Even where the output layer repeats the embedding: `survey` compares some rows, opening compares all."""
    args = ARGS.__class__(dim=16, n_layers=1, n_heads=2, vocab_size=512, multiple_of=16)
    write_checkpoint(tmp_path, args)
    tensors = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    tensors["output.weight"][3] += 1
    save_checkpoint(tmp_path, args, tensors)
    assert survey(tmp_path).args.tied_embeddings  # type: ignore[union-attr]
    assert not open_checkpoint(tmp_path).sizes.tied_embeddings


def test_urls_are_for_what_runs_a_model(directory: Path) -> None:
    for call in (lambda: open_checkpoint("gs://a/b"), lambda: convert(directory, "gs://a/b", "hf")):
        with pytest.raises(LlamaError, match="gs://a/b is a URL"):
            call()


CONVERT = ("-m", "llama", "convert")
TO_HALF = ("--to", "meta", "--dtype", "fp16")


@pytest.mark.parametrize("kilobytes", [50, 100, 250])
@pytest.mark.slow
def test_a_write_that_fails_is_told_and_left_as_found(directory: Path, tmp_path: Path, kilobytes: int) -> None:
    """A limit on the size of files gives the same errors as a full disk."""
    program = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10}))\n"
        "runpy.run_module('llama', run_name='__main__', alter_sys=True)\n"
    )
    found = run_program("-c", program, "convert", str(directory), str(tmp_path / "out"), *TO_HALF)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=[300, 600])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of so many kilobytes, if the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_left_as_found(directory: Path, small_disk: Path) -> None:
    found = run_program(*CONVERT, str(directory), str(small_disk / "out"), *TO_HALF)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not list(small_disk.iterdir())
