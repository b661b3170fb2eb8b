"""Tokens that only the files beside a tokenizer.json name: ids, stops and templates are transformers'."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from llama.errors import LlamaError
from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.hf_tokenizer import HFTokenizer

TEXT = "the sea is blue <|im_end|></s> <s>[PAD]<think>x"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>' }}{% endfor %}{{ eos_token }}"
)
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def flagged(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **FLAGS, **flags}


def make(added: list[AddedToken] | None = None, vocabulary: list[str] | None = None) -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, show_progress=False, special_tokens=vocabulary or []
    )
    made.train_from_iterator(["the sea is blue and the sky is high"], trainer)
    if vocabulary:  # tokens of the vocabulary that aren't listed as added ones
        stated = json.loads(made.to_str())
        made = Library.from_str(json.dumps(stated | {"added_tokens": []}))
    made.add_tokens(added or [])
    return made


MAP = {"bos_token": flagged("<s>", normalized=True), "eos_token": "</s>", "pad_token": "[PAD]"}
DECODER = {"297": flagged("<think>"), "290": flagged("</s>", special=True), "291": flagged("<s>", lstrip=True)}
# name -> (tokens in the tokenizer.json, its vocabulary's first words, files beside it)
CASES: dict[str, tuple[list[AddedToken], list[str], dict[str, Any]]] = {
    "map alone": ([], [], {"special_tokens_map": MAP}),
    "map over config": ([], [], {"special_tokens_map": MAP, "tokenizer_config": {"eos_token": "<|im_end|>"}}),
    "map is not read": (
        [],
        [],
        {"special_tokens_map": MAP, "tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}},
    ),
    "words of the vocabulary": ([], ["<s>", "</s>", "[PAD]"], {"special_tokens_map": MAP}),
    "map names an added word": ([AddedToken("</s>", special=False)], [], {"special_tokens_map": MAP}),
    "several more": (
        [],
        [],
        {"special_tokens_map": {**MAP, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    ),
    "several more in the config": ([], [], {"tokenizer_config": {"additional_special_tokens": ["<|im_end|>"]}}),
    "extra": ([], [], {"tokenizer_config": {"extra_special_tokens": ["<|im_end|>"], "bos_token": "<s>"}}),
    "extra with names": (
        [],
        [],
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<think>", "begin": "<s>"}}},
    ),
    "own names": ([], [], {"tokenizer_config": {"image_token": "<think>", "eos_token": "</s>"}}),
    "added_tokens.json": (
        [],
        [],
        {"added_tokens": {"<|im_end|>": 292, "</s>": 291, "<think>": 290}, "special_tokens_map": MAP},
    ),
    "added_tokens.json of several more": (
        [],
        [],
        {
            "added_tokens": {"<|im_end|>": 290, "[PAD]": 291, "<think>": 292},
            "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"], "pad_token": "[PAD]"},
        },
    ),
    "added_tokens.json and several more in the config": (
        [],
        [],
        {
            "added_tokens": {"<|im_end|>": 290, "[PAD]": 291, "<think>": 292},
            "special_tokens_map": {"additional_special_tokens": ["<s>"], "extra_special_tokens": ["<|x|>"]},
            "tokenizer_config": {"additional_special_tokens": ["<|im_end|>"]},
        },
    ),
    "added_tokens.json beside added ones": (
        [AddedToken("<think>", special=False, normalized=False)],
        [],
        {"added_tokens": {"<|im_start|>": 291, "<|im_end|>": 292}, "tokenizer_config": {"eos_token": "<|im_end|>"}},
    ),
    "decoder": ([], [], {"tokenizer_config": {"added_tokens_decoder": DECODER, "eos_token": "</s>"}}),
    "decoder states other flags": (
        [AddedToken("<s>", special=True, normalized=False), AddedToken("</s>", special=True, normalized=False)],
        [],
        {"tokenizer_config": {"added_tokens_decoder": DECODER, "eos_token": "</s>", "bos_token": "<s>"}},
    ),
}


def write(folder: Path, made: Library, files: dict[str, Any]) -> HFTokenizer:
    made.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return HFTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("normalizer", ["none", "prepend"])  # the flag "normalized" shows only with one
@pytest.mark.parametrize("name", CASES)
def test_ids_and_names_are_transformers(tmp_path: Path, name: str, normalizer: str) -> None:
    from transformers import PreTrainedTokenizerFast

    added, vocabulary, files = CASES[name]
    made = make(added, vocabulary)
    if normalizer == "prepend":
        made.normalizer = normalizers.Prepend("_")
    ours = write(tmp_path, made, files)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = ours.encode(TEXT, bos=False, eos=False, allowed_special="all")
    assert ids == theirs(TEXT, add_special_tokens=False).input_ids
    assert {ours.special_tokens[token] for token in theirs.all_special_tokens} == {*theirs.all_special_ids}
    assert ours.n_words == len(theirs)
    assert ours.bos_id == (-1 if theirs.bos_token_id is None else theirs.bos_token_id)
    assert ours.eos_id == (-1 if theirs.eos_token_id is None else theirs.eos_token_id)
    assert ours.stop_tokens == {ours.eos_id} - {-1}
    assert ours.named_tokens.items() >= theirs.special_tokens_map.items()
    if normalizer == "none":  # with one, the library decodes a normalized name, and not the token's
        assert ours.decode(ids) == theirs.decode(ids)
    plain = ours.encode(TEXT, bos=False, eos=False)
    assert not {*plain} & {*theirs.all_special_ids}


@pytest.mark.parametrize("name", ["several more", "added_tokens.json beside added ones", "words of the vocabulary"])
def test_templates_have_the_names(tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    added, vocabulary, files = CASES[name]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    ours = write(tmp_path, make(added, vocabulary), files)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = TemplateFormat(ours, datetime.now()).encode_dialog_prompt([{"role": "user", "content": "the sea"}])
    dialog = [{"role": "user", "content": "the sea"}]
    assert ids == theirs.apply_chat_template(dialog, tokenize=True, return_dict=False)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ids that are no numbers": ({"added_tokens": {"<x>": "1"}}, r"added_tokens\.json: '<x>' has no id"),
    "a decoder that is a list": (
        {"tokenizer_config": {"added_tokens_decoder": []}},
        r"tokenizer_config\.json: added_tokens_decoder is .* expected a dict of tokens by their ids",
    ),
    "a decoder without ids": ({"tokenizer_config": {"added_tokens_decoder": {"a": {}}}}, "by their ids"),
    "a token without content": ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, "with 'content'"),
    "a flag that is none": (
        {"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "<x>", "lstrip": 3}}}},
        "lstrip of '<x>' isn't true or false",
    ),
    "an extra token that is none": ({"special_tokens_map": {"additional_special_tokens": [3]}}, "with 'content'"),
    "extra tokens that are none": ({"special_tokens_map": {"additional_special_tokens": 3}}, "a list"),
    "a map that is a list": ({"special_tokens_map": []}, r"special_tokens_map\.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    files, says = BAD[name]
    with pytest.raises(LlamaError, match=says):
        write(tmp_path, make(), files)
