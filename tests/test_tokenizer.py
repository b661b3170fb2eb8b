"""Text to ids and back, against published ids, plain tiktoken and Unicode at large.

Most tests take a small vocabulary. Those that need Llama 3's read the path of its tokenizer.model from the environment
variable TOKENIZER_PATH, and are skipped where that is unset.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from vocabulary import BASE, SENTENCE, SENTENCE_IDS, SPECIALS, TOKENS, lines_of, texts, unhurried, write

import llama.tokenizer as tokenizer_module
from llama.errors import LlamaError
from llama.tokenizer import StreamDecoder, Tokenizer

# Ids and attributes


def test_special_tokens_follow_the_vocabulary_in_the_published_order(small: Tokenizer) -> None:
    assert small.special_tokens == {name: BASE + offset for name, offset in SPECIALS.items()}
    assert sorted(small.special_tokens.values()) == list(range(BASE, BASE + 256))
    assert small.n_words == small.model.n_vocab == BASE + 256
    assert (small.bos_id, small.eos_id, small.pad_id) == (BASE, BASE + 1, -1)
    assert small.stop_tokens == {BASE + 1, BASE + 9}


def test_published_ids(published: Tokenizer) -> None:
    assert published.special_tokens["<|begin_of_text|>"] == published.bos_id == 128000
    assert published.special_tokens["<|end_of_text|>"] == published.eos_id == 128001
    assert published.special_tokens["<|reserved_special_token_3|>"] == 128005
    assert published.special_tokens["<|start_header_id|>"] == 128006
    assert published.special_tokens["<|end_header_id|>"] == 128007
    assert published.special_tokens["<|reserved_special_token_4|>"] == 128008
    assert published.special_tokens["<|eot_id|>"] == 128009
    assert published.special_tokens["<|reserved_special_token_250|>"] == 128255
    assert len(published.special_tokens) == 256
    assert published.n_words == 128256
    assert published.stop_tokens == {128001, 128009}


def test_published_sentence(published: Tokenizer) -> None:
    assert published.encode(SENTENCE, bos=True, eos=True) == [128000, *SENTENCE_IDS, 128001]
    assert published.decode([128000, *SENTENCE_IDS, 128001]) == f"<|begin_of_text|>{SENTENCE}<|end_of_text|>"


# Encoding


def test_split_pattern(tmp_path: Path) -> None:
    pieces = ["I", "'LL", "'ve", " do", " ", "123", "45", " x", "!!\n\n", " ", " Ça", " ", " va", ",", " (", "s", ")"]
    pieces += ["\t\r\n", " end", "\n\n", "I", "'LL", "s", "'x", " ?!", "   "]
    text = "".join(pieces).encode()
    # Every part of the text is a token, so that nothing but the split decides what the tokens are.
    parts = {text[i:j] for i in range(len(text)) for j in range(i + 2, len(text) + 1)}
    tokens = TOKENS[:256] + sorted(parts, key=lambda part: (len(part), part))
    tokenizer = Tokenizer(write(tmp_path / "tokenizer.model", lines_of(tokens)))
    found = tokenizer.encode(text.decode(), bos=False, eos=False)
    assert [tokenizer.decode_bytes(token).decode() for token in found] == pieces


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_are_put_around_any_text(small: Tokenizer, bos: bool, eos: bool) -> None:
    for text in ("", "the"):
        body = [TOKENS.index(b"the")] if text else []
        assert small.encode(text, bos=bos, eos=eos) == [BASE] * bos + body + [BASE + 1] * eos


@unhurried
@given(text=texts)
@example(text="<|eot_id|><|begin_of_text|> the")
def test_encode_is_plain_tiktoken_on_short_text(small: Tokenizer, plain: tiktoken.Encoding, text: str) -> None:
    assert small.encode(text, bos=False, eos=False) == plain.encode(text, disallowed_special=())
    for allowed in ("all", {"<|eot_id|>", "<|begin_of_text|>", "the"}):
        ours = small.encode(text, bos=False, eos=False, allowed_special=allowed)
        theirs = plain.encode(text, allowed_special=allowed, disallowed_special=())
        assert ours == theirs


@unhurried
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | texts)
def test_round_trip_over_unicode(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text, bos=False, eos=False)) == text
    assert small.decode(small.encode(text, bos=False, eos=False, allowed_special="all")) == text


@unhurried
@given(text=texts)
def test_round_trip_in_the_published_vocabulary(published: Tokenizer, text: str) -> None:
    assert published.decode(published.encode(text, bos=False, eos=False)) == text


@unhurried
@given(before=texts, name=st.sampled_from([*SPECIALS]), after=texts)
def test_text_never_makes_control_tokens_by_default(small: Tokenizer, before: str, name: str, after: str) -> None:
    text = before + name + after
    assert max(small.encode(text, bos=False, eos=False)) < BASE
    allowed = small.encode(text, bos=False, eos=False, allowed_special={name})
    assert BASE + SPECIALS[name] in allowed  # so the text was a trap
    assert {token for token in allowed if token >= BASE} == {BASE + SPECIALS[name]}


def test_disallowed_special_refuses_the_name_it_finds(small: Tokenizer) -> None:
    with pytest.raises(LlamaError, match=r"<\|eot_id\|>.*character 4"):
        small.encode("the <|eot_id|>", bos=False, eos=False, disallowed_special="all")
    with pytest.raises(LlamaError, match=r"<\|end_of_text\|>"):
        small.encode("<|eot_id|><|end_of_text|>", bos=False, eos=False, disallowed_special=["<|end_of_text|>"])
    ids = small.encode("<|eot_id|>", bos=False, eos=False, allowed_special={"<|eot_id|>"}, disallowed_special="all")
    assert ids == [BASE + 9]
    assert small.encode("the", bos=False, eos=False, disallowed_special="all") == [TOKENS.index(b"the")]


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
def test_a_bare_name_is_no_set_of_names(small: Tokenizer, argument: str) -> None:
    options: dict[str, Any] = {argument: "<|eot_id|>"}
    with pytest.raises(LlamaError, match=argument):
        small.encode("the", bos=False, eos=False, **options)


def test_encode_refuses_what_is_not_text(small: Tokenizer) -> None:
    with pytest.raises(LlamaError, match="list"):
        small.encode(["the"], bos=False, eos=False)  # type: ignore[arg-type]


def test_surrogates_become_replacement_characters(small: Tokenizer) -> None:
    ids = small.encode("a\ud800b\udfffc", bos=False, eos=False)
    assert small.decode(ids) == "a\ufffdb\ufffdc"


# Long text


def pieces_one_character_at_a_time(text: str, max_text: int, max_run: int) -> list[str]:
    """The rule by which texts are cut, implemented in another way."""
    pieces = []
    for begin in range(0, len(text), max_text):
        piece, run = "", 0
        for character in text[begin : begin + max_text]:
            same = piece != "" and piece[-1].isspace() == character.isspace()
            run = run + 1 if same else 1
            if run > max_run:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@unhurried
@given(text=st.text("ab \n\x1c中\u2003"), max_run=st.integers(1, 5), max_text=st.integers(5, 20))
def test_cuts(text: str, max_run: int, max_text: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_RUN_CHARS", max_run)
        patch.setattr(tokenizer_module, "MAX_TEXT_CHARS", max_text)
        pieces = list(tokenizer_module._pieces(text))
    assert pieces == pieces_one_character_at_a_time(text, max_text, max_run)
    assert "".join(pieces) == text


def test_cuts_are_where_the_format_has_them(small: Tokenizer) -> None:
    assert [len(piece) for piece in tokenizer_module._pieces("a" * 60_000)] == [25_000, 25_000, 10_000]
    assert [len(piece) for piece in tokenizer_module._pieces("a b " * 100_001)] == [400_000, 4]
    # The cut shows: "the" across it isn't one token.
    across = " " * 24_999 + " " + "x" * 24_998 + "the"
    assert small.encode(across, bos=False, eos=False)[-2:] == [TOKENS.index(b"th"), TOKENS.index(b"e")]


def test_a_control_token_across_a_cut_stays_one(small: Tokenizer) -> None:
    text = "x" * 24_995 + "<|eot_id|>"
    assert small.encode(text, bos=False, eos=False, allowed_special="all")[-1] == BASE + 9
    with pytest.raises(LlamaError, match="eot_id"):
        small.encode(text, bos=False, eos=False, disallowed_special="all")


PATHOLOGICAL = {
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "lone surrogates": "\ud800" * 1_000_000,
    "NUL": "\0" * 1_000_000,
    "runs as long as may be": (" " * 24_999 + "x") * 40,
    "separators that only Python calls spaces": "!\x1c" * 500_000,
    "names of control tokens": "<|eot_id|>" * 100_000,
}


@pytest.mark.parametrize("name", PATHOLOGICAL)
@pytest.mark.parametrize("which", ["small", "published"])
def test_a_megabyte_takes_linear_time(request: pytest.FixtureRequest, which: str, name: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    text = PATHOLOGICAL[name]
    start = time.monotonic()
    ids = tokenizer.encode(text, bos=False, eos=False)
    decoded = tokenizer.decode(ids)
    assert time.monotonic() - start < 30  # seconds; each takes under one, and a quadratic algorithm minutes
    assert decoded == text.replace("\ud800", "\ufffd")


# Decoding


@pytest.mark.parametrize("token", [-1, BASE + 256, 2**40])
def test_ids_out_of_range_are_named(small: Tokenizer, token: int) -> None:
    with pytest.raises(LlamaError, match=f"{token} at position 1 .*0..{BASE + 255}"):
        small.decode([0, token])
    with pytest.raises(LlamaError, match=f"{token} .*0..{BASE + 255}"):
        StreamDecoder(small).push(token)


def test_every_id_decodes(small: Tokenizer) -> None:
    assert [small.decode_bytes(token) for token in range(small.n_words)] == [*TOKENS, *map(str.encode, SPECIALS)]
    assert small.decode([]) == ""


@unhurried
@given(tokens=st.lists(st.integers(0, BASE + 255) | st.integers(0, 127)))  # 0..127 are the bytes over 0x7f
@example(tokens=[255 - 0xF0, 255 - 0x9F, 0, 255 - 0xE4, TOKENS.index("中".encode()[1:]), 255 - 0xED, 255 - 0xA0])
def test_streamed_pieces_are_the_decoded_text(small: Tokenizer, tokens: list[int]) -> None:
    stream = StreamDecoder(small)
    for _ in range(2):  # flush leaves it as new
        assert "".join([stream.push(token) for token in tokens] + [stream.flush()]) == small.decode(tokens)


@unhurried
@given(text=texts)
def test_streamed_text_has_only_whole_characters(small: Tokenizer, text: str) -> None:
    stream = StreamDecoder(small)
    pieces = [stream.push(token) for token in small.encode(text, bos=False, eos=False)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_a_split_character_comes_out_with_its_last_token(small: Tokenizer) -> None:
    stream = StreamDecoder(small)
    assert [stream.push(255 - byte) for byte in "😀中".encode()] == ["", "", "", "😀", "", "", "中"]
    assert stream.push(255 - 0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(TOKENS.index(b"the")) == "the"
