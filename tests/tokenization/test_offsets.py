"""Offsets of tokens, compared with a count of bytes, character by character, and with transformers' own offsets."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from published_tokenizers import (
    BEGIN,
    CUT,
    FAMILIES,
    Model,
    begin_with,
    benign,
    byte_level,
    save,
    snippets,
    special,
    words,
)
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors
from vocabulary import some, texts

from llama.tokenization.export import write_tokenizer_json
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.offsets import Offsets, encode_with_offsets
from llama.tokenizer import MAX_RUN_CHARS, Tokenizer

AnyTokenizer = Tokenizer | HFTokenizer
MARKS = [
    "e\u0301",
    "a\u0301\u0323",
    "a\u0316\u0301",
    "\u1100\u1161\u11a8",
    "\u09c7\u09be",
    "\u212b",
    "the\u0344",
    "👩‍🚀",
]
composing = st.lists(
    st.one_of(snippets, st.sampled_from(MARKS), st.text(st.characters(exclude_categories=["Cs"]))), max_size=6
).map("".join)


@pytest.fixture(scope="module", params=["llama3", "llama2 legacy", "llama2", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("offsets")
    ours = HFTokenizer(save(folder, family.make(), family.config))
    return Model(family, ours, None, PreTrainedTokenizerFast.from_pretrained(folder))  # type: ignore[arg-type]


def names_in(text: str, tokenizer: AnyTokenizer) -> bool:
    return any(name in text for name in tokenizer.special_tokens)


def by_count(tokenizer: AnyTokenizer, ids: list[int], text: str, lead: int) -> Offsets:
    """The characters of which a token has some bytes, counted from the start of the text for each token."""
    sizes = [len((" " * lead + text)[:i].encode()) for i in range(lead + len(text) + 1)]
    offsets, done = [], 0
    for token in ids:
        begin, done = done, done + len(tokenizer.decode_bytes(token))
        start = max(i for i, size in enumerate(sizes) if size <= begin)
        end = min(i for i, size in enumerate(sizes) if size >= done)
        offsets.append((max(start - lead, 0), max(end - lead, 0)))
    assert done == sizes[-1]
    return offsets


def check(tokenizer: AnyTokenizer, text: str, decoded: str, lead: int = 0) -> None:
    """decoded: for each character of `text`, what the tokens decode to, after `lead` spaces."""
    ids, offsets = encode_with_offsets(tokenizer, text, bos=False)
    assert ids == tokenizer.encode(text, bos=False, eos=False)
    assert offsets == by_count(tokenizer, ids, decoded, lead)
    prefix = tokenizer.encode("", bos=True, eos=False)
    assert prefix == [tokenizer.bos_id]
    assert encode_with_offsets(tokenizer, text, bos=True) == (prefix + ids, [(0, 0), *offsets])


def check_coverage(text: str, offsets: Offsets) -> None:
    """The offsets cover all characters, in their order."""
    assert {i for start, end in offsets for i in range(start, end)} == {*range(len(text))}
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    for side in zip(*offsets, strict=True):
        assert list(side) == sorted(side)


@some
@given(text=texts)
@example(text="")
@example(text="<|eot_id|> is plain text: 中文 👩‍🚀 e\u0301")
def test_tiktoken(small: Tokenizer, text: str) -> None:
    check(small, text, text)
    check_coverage(text, encode_with_offsets(small, text, bos=False)[1])


def test_published(published: Tokenizer) -> None:
    text = "The capital of 日本 is 東京, à côté de 한국; 👩‍🚀🏽 e\u0301 ﷺ.\n\n\tनमस्ते <|eot_id|>"
    check(published, text, text)
    assert encode_with_offsets(published, "a 😀.", bos=True)[1] == [(0, 0), (0, 1), (1, 3), (3, 4)]


@pytest.fixture(scope="module")
def written(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer_json(small, folder)
    return HFTokenizer(folder / "tokenizer.json")


@some
@given(text=texts)
def test_both_tokenizers_of_one_vocabulary(small: Tokenizer, written: HFTokenizer, text: str) -> None:
    assert encode_with_offsets(written, text, bos=True) == encode_with_offsets(small, text, bos=True)


@pytest.mark.parametrize("model", ["llama3", "llama2 legacy", "llama2"], indirect=True)
@some
@given(text=benign)
@example(text="")
@example(text=" ")
@example(text="\u2581the \u2581")
@example(text="\u089fe")  # the vocabulary of bytes has the last one of "ß" and "e" as one token
@example(text="H")
@example(text="  \n\n\nthe")
def test_texts_that_are_taken_as_they_are(model: Model, text: str) -> None:
    if model.family is FAMILIES["llama3"]:
        check(model.ours, text, text)
        return
    put = model.family is FAMILIES["llama2 legacy"] or not text.startswith((" ", "\u2581"))
    check(model.ours, text, text.replace("\u2581", " "), int(put and text != ""))


def independent(text: str) -> list[int]:
    """Split a text into parts that normalization composes independently."""
    whole = unicodedata.normalize("NFC", text)
    parts = ((unicodedata.normalize("NFC", text[:i]), unicodedata.normalize("NFC", text[i:])) for i in range(len(text)))
    return [i for i, (left, right) in enumerate(parts) if left + right == whole] + [len(text)]


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
@some
@given(text=composing)
@example(text="e\u0301clair")
@example(text="a\u0301\u0323b")
def test_composed_texts(model: Model, text: str) -> None:
    """A token's offsets are within the parts that its bytes come from; all offsets together cover the text."""
    ids, offsets = encode_with_offsets(model.ours, text, bos=True)
    assert ids == model.ours.encode(text, bos=True, eos=False)
    assume(model.ours.decode(ids) == unicodedata.normalize("NFC", text))  # else the two know not the same Unicode
    check_coverage(text, offsets)
    cuts = independent(text)
    sizes = [len(unicodedata.normalize("NFC", text[:cut]).encode()) for cut in cuts]
    done = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        begin, done = done, done + len(model.ours.decode_bytes(token))
        least = max(cut for cut, size in zip(cuts, sizes, strict=True) if size <= begin)
        most = min(cut for cut, size in zip(cuts, sizes, strict=True) if size >= done)
        assert least <= start < end <= most


@some
@given(text=composing)
@example(text="H")
@example(text="e\u0301clair")
def test_beside_transformers(model: Model, text: str) -> None:
    """As transformers', but a space before the text is no character of it, and composed characters are whole."""
    assume(not names_in(text, model.ours))
    theirs = model.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encode_with_offsets(model.ours, text, bos=False)
    assert ids == theirs.input_ids
    for i, (our, their) in enumerate(zip(offsets, theirs.offset_mapping, strict=True)):
        put = our == (0, 0) and i == 0 and model.ours.decode_bytes(ids[0]) == b" "
        composed = our[0] == their[0] and our[1] > their[1] and text[slice(*our)] != unicodedata.normalize("NFC", text)
        assert our == their or put or (composed and model.family is FAMILIES["qwen2"])


def test_surrogates(model: Model, small: Tokenizer) -> None:
    text = "a\ud83d\ude00b\ud83d c😀\ude00\ud800\udc00"
    for tokenizer in (model.ours, small):
        ids, offsets = encode_with_offsets(tokenizer, text, bos=False)
        assert ids == tokenizer.encode(text, bos=False, eos=False)
        check_coverage(text, offsets)
        characters = {span for span in offsets if text[slice(*span)].strip("abc ")}
        assert {text[slice(*span)].strip() for span in characters} == {text[1:3], text[4], text[7], text[8], text[9:]}


def test_a_pair_of_surrogates_that_is_cut(small: Tokenizer) -> None:
    text = "\u4e2d" * (MAX_RUN_CHARS - 1) + "\ud83d\ude00" * 2
    ids, offsets = encode_with_offsets(small, text, bos=False)
    assert ids == small.encode(text, bos=False, eos=False)
    check_coverage(text, offsets)
    assert {*offsets[-10:]} >= {(MAX_RUN_CHARS - 1, MAX_RUN_CHARS), (MAX_RUN_CHARS, MAX_RUN_CHARS + 1)}
    assert offsets[-1] == (len(text) - 1, len(text)) or offsets[-1] == (len(text) - 2, len(text))


def test_offsets_that_the_file_asks_to_trim(tmp_path: Path) -> None:
    made = byte_level(CUT["llama3"], special("<|begin_of_text|>", "<|eot_id|>"))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    begin_with(made, "<|begin_of_text|>")
    tokenizer = HFTokenizer(save(tmp_path, made, BEGIN))
    check(tokenizer, "the  quick\n fox ", "the  quick\n fox ")


def test_a_space_before_every_part(tmp_path: Path) -> None:
    """Words that aren't in the vocabulary split a text; SentencePiece puts a space before each other word."""
    made = FAMILIES["llama2 legacy"].make()
    made.add_tokens(words("brown"))
    tokenizer = HFTokenizer(save(tmp_path, made))
    text = "H brown\u4e2d brown"
    _, offsets = encode_with_offsets(tokenizer, text, bos=True)
    check_coverage(text, offsets)
    assert [text[start:end] for start, end in offsets] == ["", "", "H", " ", "brown", "\u4e2d", " ", "brown"]


def test_characters_that_the_vocabulary_has_not(tmp_path: Path) -> None:
    made = Library(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", fuse_unk=True))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>"])
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert encode_with_offsets(tokenizer, "a\u4e2d\u4e2da", bos=True) == ([1, 0, 1], [(0, 1), (1, 3), (3, 4)])


def test_a_character_that_becomes_several(tmp_path: Path) -> None:
    made = FAMILIES["llama2"].make()
    made.normalizer = normalizers.NFKC()
    tokenizer = HFTokenizer(save(tmp_path, made))
    _, offsets = encode_with_offsets(tokenizer, "\ufb01x\u00bd", bos=False)
    assert offsets[:3] == [(0, 1), (0, 1), (1, 2)] and {*offsets[3:]} == {(2, 3)}
