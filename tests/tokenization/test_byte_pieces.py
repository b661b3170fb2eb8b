"""Pieces such as <0x0A>: bytes where the decoder of the tokenizer.json says so, else the text that they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from llama.tokenization.hf_tokenizer import HFTokenizer

WORDS = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁sea", "a", "▁", "<0xaf>", "▁ ▁b"]
TO_SPACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS: dict[str, Any] = {
    "Metaspace alone": decoders.Metaspace(),
    "Metaspace that keeps the first space": decoders.Metaspace(prepend_scheme="never"),
    "Metaspace, then bytes": decoders.Sequence([decoders.Metaspace(), BYTES]),
    "bytes, then Metaspace": decoders.Sequence([BYTES, decoders.Metaspace()]),
    "Llama's": decoders.Sequence([TO_SPACE, BYTES, FUSE, decoders.Strip(" ", 1, 0)]),
    "no bytes": decoders.Sequence([TO_SPACE, FUSE]),
    "bytes alone": BYTES,
    "bytes of a fused text": decoders.Sequence([TO_SPACE, FUSE, BYTES]),
    "bytes whose names are replaced before": decoders.Sequence([decoders.Replace("0", "1"), BYTES, FUSE]),
    "spaces of every piece": decoders.Sequence([TO_SPACE, BYTES, decoders.Strip(" ", 1, 0)]),
    "two spaces of every piece": decoders.Sequence([TO_SPACE, decoders.Strip(" ", 2, 0), FUSE]),
}


def ids_of(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


TEXTS = {
    "a newline": ids_of("▁the", "<0x0A>", "▁sea"),
    "a newline first": ids_of("a", "<0x0A>", "▁sea", "▁", "▁ ▁b"),
    "two bytes of a letter": ids_of("▁the", "<0xC3>", "<0xA4>", "a"),
    "a byte that is no letter": ids_of("▁sea", "<0xE2>", "▁", "a"),
    "small letters": ids_of("▁the", "<0xC3>", "<0xaf>", "<0x61>"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_text_of_ids_is_transformers(tmp_path: Path, decoder: str, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    made = Library(models.BPE({word: i for i, word in enumerate(WORDS)}, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = DECODERS[decoder]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": False}))
    tokenizer, ids = HFTokenizer(tmp_path / "tokenizer.json"), TEXTS[text]
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).decode(ids)
    assert tokenizer.decode(ids) == expected
    stream = tokenizer.stream_decoder()
    for _ in range(2):
        assert "".join(map(stream.push, ids)) + stream.flush() == expected
