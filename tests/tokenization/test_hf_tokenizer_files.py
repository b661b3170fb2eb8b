"""The attributes that a tokenizer.json and the files beside it give, and the errors for damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_tokenizers
import pytest
from published_tokenizers import IM, Model, llama3, qwen, save
from vocabulary import TOKENS, lines_of, write

from llama.errors import LlamaError
from llama.tokenization.hf_tokenizer import HFTokenizer, open_tokenizer
from llama.tokenizer import Tokenizer

model = published_tokenizers.model


def test_attributes(model: Model) -> None:
    tokenizer, theirs = model.ours, model.theirs
    assert tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.bos_id == (-1 if theirs.bos_token_id is None else theirs.bos_token_id)
    assert tokenizer.stop_tokens == {tokenizer.eos_id}
    assert tokenizer.named_tokens == theirs.special_tokens_map
    assert all(theirs.convert_tokens_to_ids(name) == token for name, token in tokenizer.special_tokens.items())
    assert set(theirs.all_special_tokens) <= tokenizer.special_tokens.keys()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [421, 422]}, {"eos_token_id": 420}, {421, 422}),
        ({"eos_token_id": 421}, None, {421}),
        ({"eos_token_id": None}, {"eos_token_id": [420]}, {420}),
        ({"eos_token_id": []}, {"eos_token_id": 420}, {420}),
        (None, {"eos_token_id": 420}, {420}),
        (None, {}, {422}),
    ],
)
def test_stop_tokens(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    files = {"generation_config": generation, "config": config}
    path = save(tmp_path, qwen(), IM, **{name: value for name, value in files.items() if value is not None})
    tokenizer = HFTokenizer(path)
    assert tokenizer.special_tokens["<|im_end|>"] == tokenizer.eos_id == 422
    assert tokenizer.stop_tokens == expected


def test_without_names_the_files_tell_the_ends(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save(tmp_path, llama3(), generation_config={"eos_token_id": [425, 421]}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.special_tokens["<|begin_of_text|>"], 425)


BAD_SIBLINGS: list[tuple[str, Any, str]] = [
    ("generation_config", {"eos_token_id": "2"}, r"generation_config.json: eos_token_id is str '2'"),
    ("generation_config", {"eos_token_id": True}, "generation_config.json: eos_token_id is bool"),
    ("generation_config", {"eos_token_id": [1, 2.0]}, "eos_token_id is list"),
    ("generation_config", {"eos_token_id": [1, 10**9]}, r"eos_token_id .* expected ids in 0..\d+"),
    ("config", {"eos_token_id": -1}, r"/config.json: eos_token_id"),
    ("config", [1], "/config.json: expected a JSON object"),
    ("generation_config", "<html>", "generation_config.json is not JSON"),
    ("tokenizer_config", "{", "tokenizer_config.json is not JSON"),
    ("tokenizer_config", "[" * 100_000, "tokenizer_config.json is not JSON"),
    ("tokenizer_config", {"eos_token": 2}, "tokenizer_config.json: eos_token is int 2"),
    ("tokenizer_config", {"bos_token": {"text": "<s>"}}, "tokenizer_config.json: bos_token is dict"),
    ("tokenizer_config", {"chat_template": 1}, "tokenizer_config.json: chat_template is int"),
    ("tokenizer_config", {"chat_template": [1]}, "tokenizer_config.json: chat_template is list"),
    ("tokenizer_config", {"chat_template": [{"name": "default", "template": 1}]}, "chat_template is list"),
    ("tokenizer_config", {"chat_template": [{"name": [], "template": ""}]}, "chat_template is list"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_SIBLINGS)
def test_bad_files_beside_are_told(tmp_path: Path, name: str, content: Any, says: str) -> None:
    path = save(tmp_path, qwen(), **{name: content})
    with pytest.raises(LlamaError, match=says) as refusal:
        HFTokenizer(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 300


def damaged(**changes: Any) -> str:
    return json.dumps(json.loads(qwen().to_str()) | changes)


def in_part(part: str, **changes: Any) -> str:
    stated = json.loads(qwen().to_str())
    return json.dumps(stated | {part: stated[part] | changes})


A = {"id": 420, "content": "<a>", "special": True, "normalized": False}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
BAD_FILES: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "empty"),
    "HTML": (lambda: "<!DOCTYPE html>", "HTML"),
    "LFS": (lambda: "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2183982\n", "git lfs pull"),
    "truncated": (lambda: damaged()[:-100], "is not JSON"),
    "a list": (lambda: "[]", "expected a JSON object"),
    "another object": (lambda: '{"vocab_size": 3}', r"without a 'model', only \['vocab_size'\]"),
    "a vocabulary": (lambda: '{"model": 3}', "without a 'model'"),
    "no vocabulary": (lambda: '{"model": {}}', "no tokenizer could be made"),
    "vocabulary of numbers": (lambda: in_part("model", vocab=3), "no tokenizer could be made"),
    "vocabulary of texts": (lambda: in_part("model", vocab={"a": "b"}), "no tokenizer could be made"),
    "negative id": (lambda: in_part("model", vocab={"a": -1}), "no tokenizer could be made"),
    "empty vocabulary": (
        lambda: damaged(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
        "vocabulary is empty",
    ),
    "merges of numbers": (lambda: in_part("model", merges=[1, 2]), "no tokenizer could be made"),
    "merges of nothing": (lambda: in_part("model", merges=[["zz", "qq"]]), "no tokenizer could be made"),
    "unknown token": (lambda: in_part("model", unk_token=[1]), "no tokenizer could be made"),
    "unknown model": (lambda: in_part("model", type="GPT"), "no tokenizer could be made"),
    "added tokens": (lambda: damaged(added_tokens={"a": 1}), "'added_tokens' is dict"),
    "an added token": (lambda: damaged(added_tokens=["a"]), "'added_tokens' has str 'a'"),
    "no flags": (lambda: damaged(added_tokens=[A]), "no tokenizer could be made"),
    "an empty name": (lambda: damaged(added_tokens=[A | FLAGS | {"content": ""}]), "'added_tokens' has dict"),
    "another id": (lambda: damaged(added_tokens=[A | FLAGS | {"id": 999}]), "'<a>' the id 999, .* has 420"),
    "the id of a word": (
        lambda: damaged(
            model={"type": "BPE", "vocab": {"a": 0, "<a>": 0}, "merges": []}, added_tokens=[A | FLAGS | {"id": 0}]
        ),
        "'a' has the id 0 of the control token '<a>'",
    ),
    "another decoder": (
        lambda: damaged(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "'decoder' has the step .*WordPiece",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, says = BAD_FILES[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(make())
    for read in (HFTokenizer, open_tokenizer):
        with pytest.raises(LlamaError, match=says) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 400


def test_what_the_library_refuses_at_a_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}, added_tokens=[]))
    with pytest.raises(LlamaError, match="can't encode the text"):
        HFTokenizer(path).encode("b", bos=False, eos=False)


def test_the_content_says_which_tokenizer_it_is(tmp_path: Path) -> None:
    saved = save(tmp_path, qwen())
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\xef\xbb\xbf\n " + saved.read_bytes())
    assert type(open_tokenizer(path)) is HFTokenizer
    assert type(open_tokenizer(write(path, lines_of(TOKENS)))) is Tokenizer
    path.rename(tmp_path / "tokenizer.json")
    with pytest.raises(LlamaError, match="is not JSON"):
        open_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(LlamaError, match="directory"):
        open_tokenizer(tmp_path)
    with pytest.raises(LlamaError, match="no such file"):
        open_tokenizer(tmp_path / "absent.model")
    with pytest.raises(LlamaError, match=r"absent\.json"):
        HFTokenizer(tmp_path / "absent.json")


def test_a_sentencepiece_file_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    pieces = [b"\n\x05<unk>\x15\0\0\0\0\x18\x02", b"\n\x03<s>\x15\0\0\0\0\x18\x03", b"\n\x01a\x15\0\0\x80\xbf"]
    path.write_bytes(b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces))
    with pytest.raises(LlamaError, match=r"SentencePiece .* tokenizer\.json of the same model") as refusal:
        open_tokenizer(path)
    assert str(path) in str(refusal.value)
