"""What the commands sample with where the user sets nothing: as the model's generation_config.json says."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_program, write_hf_checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig

from llama import Llama, LlamaError
from llama.checkpoints.checkpoint import Checkpoint
from llama.checkpoints.convert import convert
from llama.checkpoints.loader import find_checkpoint
from llama.checkpoints.recommended import FILE, FOREIGN, read_recommended
from llama.cli.model_options import add_model_options, read_settings, recommend_settings

pytestmark = pytest.mark.usefixtures("place")
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In Hugging Face's format, without an end that the model likes."""
    return write_hf_checkpoint(tmp_path_factory.mktemp("recommended"), endless=True)


def set_file(directory: Path, **values: Any) -> None:
    (directory / FILE).write_text(json.dumps(values))


def settings(directory: Path, *words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    options = parser.parse_args(["--ckpt_dir", str(directory), "--device", "cpu", *words])
    return read_settings(options, recommend_settings(options))


def is_subset(some: dict[str, Any], of: dict[str, Any]) -> bool:
    return some.items() <= of.items()


def test_the_files_values_are_where_the_user_sets_none(directory: Path, capsys: pytest.CaptureFixture) -> None:
    set_file(directory, **QWEN)
    assert is_subset({k: v for k, v in QWEN.items() if k != "do_sample"}, settings(directory))
    told = "generation_config.json: temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05"
    assert capsys.readouterr().err == f"({told})\n"
    found = settings(directory, "--temperature", "1.5", "--top_k", "3")
    assert is_subset({"temperature": 1.5, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.05}, found)
    assert capsys.readouterr().err == "(generation_config.json: top_p 0.8, repetition_penalty 1.05)\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"temperature": 0.6, "top_p": 0.9, "top_k": None}),
        ({"do_sample": False}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0, "top_p": 0.8}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": None}, {"top_k": None, "top_p": 1.0}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        ({"no_repeat_ngram_size": 3, "min_p": 0.05}, {"no_repeat_ngram_size": 3, "min_p": 0.05}),
        ({"eos_token_id": 2, "max_new_tokens": 5, "transformers_version": "4"}, {"temperature": 0.6}),
    ],
)
def test_forms(directory: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    set_file(directory, **values)
    assert is_subset(expected, settings(directory))


def test_a_users_zero_wins_over_a_sampling_file(directory: Path) -> None:
    set_file(directory, **QWEN)
    assert settings(directory, "--temperature", "0")["temperature"] == 0
    set_file(directory, do_sample=False)
    assert settings(directory, "--temperature", "0.8")["temperature"] == 0.8


@pytest.mark.parametrize("values", [{}, {"do_sample": True}, {"temperature": 0.6, "top_p": 0.9}])
def test_nothing_is_said_where_nothing_changes(
    directory: Path, values: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    set_file(directory, **values)
    settings(directory)
    (directory / FILE).unlink()
    settings(directory)
    assert capsys.readouterr().err == ""


def test_what_is_not_used_is_told(directory: Path, capsys: pytest.CaptureFixture) -> None:
    set_file(directory, num_beams=4, typical_p=1.0, temperature=1.0, suppress_tokens=[], min_new_tokens=3)
    settings(directory)
    expected = "(generation_config.json: temperature 1.0; not used here: num_beams, min_new_tokens)\n"
    assert capsys.readouterr().err == expected


def test_foreign_keys_are_transformers_own() -> None:
    known = {*vars(GenerationConfig()), "penalty_alpha", "diversity_penalty", "num_beam_groups"}  # some came and went
    assert not FOREIGN.keys() - known


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"temperature": "hot"},
            "temperature is 'hot', expected a number of at least 0: correct it, or remove",
        ),
        ({"top_p": 0}, "top_p is 0, expected a number in (0, 1]"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"repetition_penalty": [1]}, "repetition_penalty is [1]"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"min_p": {}}, "min_p is {}"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
    ],
)
def test_what_cannot_be_is_named(directory: Path, values: dict[str, Any], message: str) -> None:
    set_file(directory, **values)
    with pytest.raises(LlamaError) as error:
        settings(directory)
    assert message in str(error.value) and str(directory / FILE) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_file_that_is_none(directory: Path, text: str) -> None:
    (directory / FILE).write_text(text)
    with pytest.raises(LlamaError, match=FILE):
        read_recommended(Checkpoint(*find_checkpoint(directory)))


def test_it_is_found_beside_original(directory: Path, tmp_path: Path) -> None:
    set_file(directory, **QWEN)
    convert(directory, tmp_path / "meta" / "original", "meta")
    (tmp_path / "meta" / "original" / FILE).rename(tmp_path / "meta" / FILE)
    assert settings(tmp_path / "meta")["top_k"] == 20


def test_a_greedy_file_gives_the_text_of_transformers(directory: Path) -> None:
    set_file(directory, do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2)
    llama = Llama.build(directory, device="cpu", dtype="float32")
    prompt = llama.tokenizer.encode("hello there", bos=True, eos=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.tensor([prompt])
    theirs = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, pad_token_id=0)
    expected = llama.tokenizer.decode(theirs[0, len(prompt) :].tolist())
    command = ("-m", "llama", "complete", "--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32")
    done = run_program(*command, "--max_gen_len", "12", "hello there")
    assert done.stdout == expected + "\n"
    line = "(generation_config.json: temperature 0, repetition_penalty 1.3, no_repeat_ngram_size 2)"
    assert line in done.stderr.splitlines()


def test_a_file_of_prompts(directory: Path, tmp_path: Path) -> None:
    set_file(directory, do_sample=False, repetition_penalty=2.5)
    (tmp_path / "in").write_text('{"prompt": "hello"}\n{"prompt": "hello", "repetition_penalty": 1}\n')
    command = ("-m", "llama", "complete", "--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32")
    done = run_program(
        *command, "--max_gen_len", "60", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    llama = Llama.build(directory, device="cpu", dtype="float32")
    options = [{"repetition_penalty": 2.5}, {}]
    expected = [llama.text_completion(["hello"], 0, max_gen_len=60, **o)[0]["generation"] for o in options]
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [record["generation"] for record in records] == expected and expected[0] != expected[1]


def test_methods_keep_their_own_defaults(directory: Path) -> None:
    llama = Llama.build(directory, device="cpu", dtype="float32")
    set_file(directory, do_sample=False)
    same = Llama.build(directory, device="cpu", dtype="float32")
    assert llama.text_completion(["hello"], max_gen_len=9) == same.text_completion(["hello"], max_gen_len=9)
