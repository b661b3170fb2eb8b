"""Ids and text of tokenizer.json are those of transformers, and no text makes a control token."""

import unicodedata
from pathlib import Path
from typing import Any

import published_tokenizers
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from published_tokenizers import CUT, PARAGRAPH, Model, benign, byte_level, is_benign, llama3, qwen, save, special
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from vocabulary import TOKENS, some

from llama.errors import LlamaError
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenizer import Tokenizer

model, qwen_path = published_tokenizers.model, published_tokenizers.qwen_path

# Texts


@some
@given(text=benign)
@example(text=" brown fox  <s")
@example(text="")
def test_ids_and_text_are_transformers(model: Model, text: str) -> None:
    if not is_benign(model, text):
        return
    ids = model.ours.encode(text, bos=False, eos=False)
    assert ids == model.theirs(text, add_special_tokens=False).input_ids
    assert model.ours.encode(text, bos=True, eos=False) == model.theirs(text).input_ids
    assert model.ours.encode(text, bos=False, eos=True) == [*ids, model.theirs.eos_token_id]
    assert model.ours.decode(ids) == model.theirs.decode(ids)


@some
@given(pieces=st.lists(st.tuples(benign, st.integers(0, 20)), max_size=4))
def test_allowed_names_become_tokens_as_in_transformers(model: Model, pieces: list[tuple[str, int]]) -> None:
    names = [*model.ours.special_tokens]
    text = "".join(part + names[i % len(names)] for part, i in pieces)
    expected = model.theirs(text, add_special_tokens=False).input_ids
    assert model.ours.encode(text, bos=False, eos=False, allowed_special="all") == expected


@some
@given(before=benign, i=st.integers(0, 20), after=benign)
@example(before="", i=1, after="")
def test_text_makes_no_control_token(model: Model, before: str, i: int, after: str) -> None:
    names = [*model.ours.special_tokens]
    name = names[i % len(names)]
    text = before + name + after
    ids = model.ours.encode(text, bos=False, eos=False)
    assert model.controls(ids) == []
    assert model.readable(model.ours.decode(ids)) == model.readable(text)
    allowed = model.ours.encode(text, bos=False, eos=False, allowed_special={name})
    assert set(model.controls(allowed)) == {model.ours.special_tokens[name]}
    with pytest.raises(LlamaError, match="disallowed_special"):
        model.ours.encode(text, bos=False, eos=False, disallowed_special="all")


def test_lone_surrogates_and_what_is_no_text(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    ids = tokenizer.encode("a\ud800b\ud83d\ude00", bos=False, eos=False)
    assert tokenizer.decode(ids) == "a\ufffdb😀"
    with pytest.raises(LlamaError, match="list"):
        tokenizer.encode(["the"], bos=False, eos=False)  # type: ignore[arg-type]
    for argument in ("allowed_special", "disallowed_special"):
        options: dict[str, Any] = {argument: "<|im_end|>"}
        with pytest.raises(LlamaError, match=argument):
            tokenizer.encode("the", bos=False, eos=False, **options)


def test_disallowed_names_are_told_unless_allowed(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    with pytest.raises(LlamaError, match=r"'<\|im_end\|>' at character 4"):
        tokenizer.encode("the <|im_end|>", bos=False, eos=False, disallowed_special={"<|im_end|>"})
    options: dict[str, Any] = {"allowed_special": {"<|im_end|>"}, "disallowed_special": "all"}
    ids = tokenizer.encode("<|im_end|>", bos=False, eos=False, **options)
    assert ids == [tokenizer.special_tokens["<|im_end|>"]]


def test_added_tokens_without_brackets_and_flag_are_words(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    assert "brown fox" not in tokenizer.special_tokens
    assert len(tokenizer.encode("brown fox", bos=False, eos=False)) == 1
    assert {"<think>", "</think>", "<|fim_prefix|>", "<|im_end|>"} < tokenizer.special_tokens.keys()
    assert tokenizer.flagged_special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("normalizer", [None, normalizers.Prepend("\u2581")])
def test_flags_of_control_tokens_are_kept(tmp_path: Path, normalizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    made = byte_level(CUT["qwen"], [AddedToken("<a>", lstrip=True, rstrip=True, normalized=False, special=True)])
    made.normalizer = normalizer
    made.add_tokens([AddedToken("<b>", normalized=True, special=True, single_word=True)])
    ours = HFTokenizer(save(tmp_path, made))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("the <a>  fox <a>", "<b> fox", "<a> \n", "fox  <a> <b>"):
        ids = ours.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert set(ids) & set(ours.special_tokens.values())


def test_a_control_token_that_the_library_does_not_find_is_text_as_in_transformers(tmp_path: Path) -> None:
    made = byte_level(CUT["qwen"], [AddedToken("<b>", normalized=True, special=True)])
    made.normalizer = normalizers.Prepend("\u2581")
    tokenizer = HFTokenizer(save(tmp_path, made))
    for text, count in ("<b>", 1), ("the<b>", 0), ("<b>the<b>", 1):
        ids = tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == made.encode(text).ids and ids.count(tokenizer.special_tokens["<b>"]) == count


def test_of_names_that_begin_alike_the_longest_counts(tmp_path: Path) -> None:
    made = byte_level(CUT["qwen"], special("<a>", "<a>b", "<a>bc"))
    tokenizer = HFTokenizer(save(tmp_path, made))
    text = "<a>b<a>bc<a><a>b"
    assert tokenizer.encode(text, bos=False, eos=False, allowed_special="all") == made.encode(text).ids


def test_truncation_and_padding_of_the_file_are_for_training(tmp_path: Path) -> None:
    made = qwen()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.decode(tokenizer.encode(PARAGRAPH, bos=False, eos=False)) == unicodedata.normalize(
        "NFC", PARAGRAPH
    )


def test_what_the_tokenizer_puts_after_a_text_is_not_put_before(tmp_path: Path) -> None:
    made = llama3()
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    ids = [(name, made.token_to_id(name)) for name in names]
    made.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} {names[1]} $A {names[2]}", special_tokens=ids
    )
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("", bos=True, eos=False) == [ids[0][1], ids[1][1]]
    assert tokenizer.bos_id == tokenizer.eos_id == -1  # two tokens before a text, and no name for either
    with pytest.raises(LlamaError, match="eos=False"):
        tokenizer.encode("the", bos=True, eos=True)


def test_unknown_characters_may_become_the_unknown_token(tmp_path: Path) -> None:
    made = Library(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>"])
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("a\u4e2da", bos=False, eos=False) == [1, 0, 1]


def test_unigram_vocabularies_are_read(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("\u2581", -2.0), ("the", -3.0), *((c, -9.0) for c in "<s>the")]
    made = Library(models.Unigram([*dict(pieces).items()], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>"])
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("the", bos=False, eos=False) == made.encode("the").ids
    assert 1 not in tokenizer.encode("the <s>", bos=False, eos=False)
    assert 0 in tokenizer.encode("the é", bos=False, eos=False)
    ids = tokenizer.encode("the <s>", bos=False, eos=False, allowed_special="all")
    assert ids == made.encode("the <s>").ids
    assert tokenizer.decode(ids) == "the <s>"


# Decoding


@some
@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(model: Model, data: st.DataObject) -> None:
    tokenizer = model.ours
    text = data.draw(benign)
    ids = tokenizer.encode(text, bos=data.draw(st.booleans()), eos=False)
    ids += data.draw(st.lists(st.integers(0, tokenizer.n_words + 5)))
    stream = tokenizer.stream_decoder()
    for _ in range(2):  # flush leaves it as new
        assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == tokenizer.decode(ids)


@some
@given(text=benign)
def test_streamed_text_has_only_whole_characters(model: Model, text: str) -> None:
    stream = model.ours.stream_decoder()
    ids = model.ours.encode(text, bos=True, eos=False)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == model.ours.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_every_id_decodes_as_in_transformers(model: Model) -> None:
    tokenizer = model.ours
    for token in range(tokenizer.n_words):
        theirs = model.theirs.decode([token])
        assert tokenizer.decode([token]) == theirs
        assert tokenizer.decode([token, token]) == model.theirs.decode([token, token])
    assert tokenizer.decode(tokenizer.special_tokens.values()) == "".join(tokenizer.special_tokens)  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_are_nothing_and_negative_ones_are_refused(model: Model) -> None:
    tokenizer = model.ours
    ids = tokenizer.encode("the fox", bos=False, eos=False)
    assert tokenizer.n_words == len(model.theirs)
    assert tokenizer.decode([tokenizer.n_words, *ids, 2**40]) == "the fox"
    with pytest.raises(LlamaError, match="-1 at position 1"):
        tokenizer.decode([0, -1])
    with pytest.raises(LlamaError, match="-1"):
        tokenizer.stream_decoder().push(-1)


def test_the_other_tokenizer_has_a_stream_decoder_too(small: Tokenizer) -> None:
    stream = small.stream_decoder()
    assert stream.push(TOKENS.index(b"the")) + stream.flush() == "the"
