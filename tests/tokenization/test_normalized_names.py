"""Control tokens marked "normalized", whose names a normalizer changes: found where transformers finds them."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from byte_level import train_byte_level
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.hf_tokenizer import HFTokenizer

LOWER, ACCENTS = normalizers.Lowercase(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
NORMALIZERS = {
    "lowercase": LOWER,
    "accents": ACCENTS,
    "another letter": normalizers.Replace("E", "x"),
    "lowercase after spaces": normalizers.Sequence([PREPEND, LOWER]),
    "none": None,
}
TOKENS = {
    "normalized": [AddedToken("<END>", special=True, normalized=True)],
    "not normalized": [AddedToken("<END>", special=True, normalized=False)],
    "not special": [AddedToken("<END>", special=False, normalized=True)],
    "without brackets": [AddedToken("Séa", special=True, normalized=True)],
    "a part of another": [AddedToken("<END>x", normalized=True), AddedToken("x<END>", special=True, normalized=False)],
    "stripping": [AddedToken("<END>", special=True, normalized=True, lstrip=True, rstrip=True)],
    "single word": [AddedToken("SEA", special=True, normalized=True, single_word=True)],
}
PIECES = ["<END>", "<end>", "<xND>", "SEA", "sea", "séa", "Se\u0301a", " ", "x", "the", "▁", "\n"]


def make(folder: Path, normalizer: Any, added: list[AddedToken]) -> HFTokenizer:
    made = train_byte_level()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(added)
    made.save(str(folder / "tokenizer.json"))
    return HFTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_names_are_found_as_in_transformers(
    tmp_path_factory: pytest.TempPathFactory, tokens: str, normalizer: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("normalized")
    tokenizer = make(folder, NORMALIZERS[normalizer], TOKENS[tokens])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)

    @settings(deadline=None, max_examples=20)
    @given(text=st.lists(st.sampled_from(PIECES), max_size=5).map("".join))
    @example(text="the <end> x<END>x <xND>")
    @example(text="SEA sea Séa the séa")
    def check(text: str) -> None:
        expected = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, bos=False, eos=False, allowed_special="all") == expected
        controls = {*tokenizer.special_tokens.values()}
        assert controls.isdisjoint(tokenizer.encode(text, bos=False, eos=False))

    check()


def test_only_the_names_that_are_allowed(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, LOWER, [AddedToken(name, special=True, normalized=True) for name in ("<A>", "<B>")])
    ids = tokenizer.special_tokens
    found = tokenizer.encode("<a><b><A><B>", bos=False, eos=False, allowed_special={"<B>"})
    assert [token for token in found if token in ids.values()] == [ids["<B>"]] * 2


def test_a_template_may_write_a_name_otherwise_and_a_user_may_not(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = "{% for message in messages %}{{ message.content + '<end>' }}{% endfor %}<END>"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = make(tmp_path, LOWER, TOKENS["normalized"])
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    dialog = [{"role": "user", "content": "the SEA"}]
    ids = TemplateFormat(tokenizer, datetime.now()).encode_dialog_prompt(dialog)
    assert ids == theirs.apply_chat_template(dialog, tokenize=True, return_dict=False)
    for content in ("<end>", "<END>", "<eNd> x"):
        ids = TemplateFormat(tokenizer, datetime.now()).encode_dialog_prompt([{"role": "user", "content": content}])
        assert ids.count(tokenizer.special_tokens["<END>"]) == 2
