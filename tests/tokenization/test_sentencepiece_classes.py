"""Classes of transformers that cut texts their own way: those of SentencePiece's notation, and others of bytes."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from llama.tokenization.hf_tokenizer import HFTokenizer

TEXTS = ["the sea", " the sea", "the  sea is 12 345\n\n now", "  e\u0301<|im_start|>the sea<|im_end|> x"]
STARTS = {
    "prepended": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "plain": normalizers.Replace(" ", "▁"),
}


def write_words(folder: Path, start: str) -> None:
    """A tokenizer in SentencePiece's notation."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for word in ("▁the", "▁sea", "the", "sea", "▁▁"):
        for i in range(len(word)):
            vocab.setdefault(word[i], len(vocab))
        for i in range(1, len(word)):
            if word[: i + 1] not in vocab:
                vocab[word[: i + 1]] = len(vocab)
                merges.append((word[:i], word[i]))
    made = Library(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = STARTS[start]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    finish(made, folder)


def write_bytes(folder: Path) -> None:
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(["the sea is 12 345 é the sea"] * 9, trainer)
    finish(made, folder)


def finish(made: Library, folder: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def check(folder: Path, model_type: str, settings: dict[str, object]) -> None:
    """The ids and the texts are transformers'."""
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = HFTokenizer(folder / "tokenizer.json")
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text, bos=True, eos=False, allowed_special="all") == expected, text
        assert ours.decode(expected[1:]) == theirs.decode(expected[1:]), text


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
@pytest.mark.parametrize("start", STARTS)
def test_words_are_cut_as_by_the_class(tmp_path: Path, start: str, name: str, settings: dict[str, object]) -> None:
    write_words(tmp_path, start)
    check(tmp_path, "llama", settings | {"tokenizer_class": name})


@pytest.mark.parametrize("name", ["GemmaTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"])
@pytest.mark.parametrize("start", STARTS)
def test_other_classes_of_words(tmp_path: Path, start: str, name: str) -> None:
    write_words(tmp_path, start)
    check(tmp_path, "llama", {"tokenizer_class": name})


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CohereTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend"])
def test_bytes_are_cut_as_by_the_class(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    write_bytes(tmp_path)
    check(tmp_path, "llama", settings | {"tokenizer_class": name})


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer"])
def test_files_of_mistral_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    write_bytes(tmp_path)
    check(tmp_path, "mistral", {"tokenizer_class": name})
