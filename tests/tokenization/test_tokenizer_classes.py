"""Directories whose class of transformers cuts texts its own way, whatever their tokenizer.json says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llama.tokenization.hf_tokenizer import HFTokenizer

TEXT = "12:00 e\u0301 don'T 2024  x"
TRAINED = ["the quick brown fox 12345 12:00", "a b c 2024 2025 12:00 Ça va, don't"] * 20


def write_tokenizer(folder: Path, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    special = ["<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TRAINED,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    return made


@pytest.mark.parametrize("named", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_ids_are_those_of_the_class(
    tmp_path: Path, model_type: str, named: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    made = write_tokenizer(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    settings = {"eos_token": "<|im_end|>"} | ({"tokenizer_class": named} if named else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    expected = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    capsys.readouterr()
    ours = HFTokenizer(tmp_path / "tokenizer.json")
    assert ours.encode(TEXT, bos=True, eos=False) == expected
    is_rebuilt = expected != made.encode(TEXT).ids
    assert is_rebuilt == (
        model_type == "qwen2" or bool(named and "Qwen2" in named) or (model_type, named) == ("qwen3", None)
    )
    assert ("as Qwen2Tokenizer cuts them" in capsys.readouterr().err) == is_rebuilt


def test_a_published_file_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from published_tokenizers import qwen, save

    path = save(tmp_path, qwen())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    ours = HFTokenizer(path)
    assert ours.encode(TEXT, bos=False, eos=False) == qwen().encode(TEXT).ids
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model_type", [["qwen2"], {}, 3, None])
def test_a_model_type_that_is_no_name_says_nothing(tmp_path: Path, model_type: object) -> None:
    made = write_tokenizer(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert HFTokenizer(tmp_path / "tokenizer.json").encode(TEXT, bos=True, eos=False) == made.encode(TEXT).ids
