"""A tokenizer.json with more tokens than the model: those can't be used, and all else runs as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from llama import Llama
from llama.checkpoints.inspect import inspect
from llama.errors import LlamaError

TEMPLATE = "{% for message in messages %}{{ message.content }}{{ '<sep>' if message.role == 'assistant' }}{% endfor %}"


def write(directory: Path, vocab_size: int, last: list[AddedToken], prefix: str = "<s>", **settings: Any) -> Path:
    """A model of 256 bytes, <s>, </s> and more, up to `vocab_size`; the tokens `last` are added to those."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Library(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    made.add_tokens(last)
    made.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A", special_tokens=[(prefix, made.token_to_id(prefix))]
    )
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **settings).save_pretrained(
        directory
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, initializer_range=0.3)).save_pretrained(
        directory
    )
    return directory


def build(directory: Path) -> Llama:
    return Llama.build(directory, device="cpu", dtype="float32", max_seq_len=64)


def added(*names: str, special: bool = True) -> list[AddedToken]:
    return [AddedToken(name, special=special, normalized=False) for name in names]


@pytest.mark.parametrize("extra", [1, 3])
def test_all_else_runs_as_in_transformers(tmp_path: Path, extra: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["<pad>", "<x>", "<y>"][:extra]
    llama = build(write(tmp_path, 258, added(*names), pad_token="<pad>"))
    ids = AutoTokenizer.from_pretrained(tmp_path)("the sea is").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
    completion = llama.complete([ids], max_gen_len=6, temperature=0)[0]
    assert completion.tokens == expected.tolist()[: len(completion.tokens)] and completion.tokens
    assert llama.tokenizer.n_words == 258 + extra
    assert llama.text_completion(["the <pad>"], max_gen_len=2)  # text, and not the token
    assert llama.score(["the sea"])[0].tokens == ids[:8]
    assert inspect(tmp_path).problems == []


def test_the_token_is_refused_by_name_wherever_it_comes_up(tmp_path: Path) -> None:
    llama = build(write(tmp_path, 258, added("<sep>"), chat_template=TEMPLATE))
    says = "the token '<sep>', whose id 258 the model of vocab_size 258 doesn't know"
    with pytest.raises(LlamaError, match=says):
        llama.tokenizer.encode("a<sep>", bos=True, eos=False, allowed_special="all")
    with pytest.raises(LlamaError, match=says):
        llama.chat_completion([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
    with pytest.raises(LlamaError, match=r"token 258, expected whole numbers in \[0, 258\)"):
        llama.complete([[258]])
    assert llama.chat_completion([[{"role": "user", "content": "a<sep>"}]], max_gen_len=2)


def test_a_word_is_refused_by_name(tmp_path: Path) -> None:
    llama = build(write(tmp_path, 258, added("sea", special=False)))
    for call in (llama.text_completion, llama.score, llama.embed):
        with pytest.raises(LlamaError, match="the token 'sea', whose id 258"):
            call(["the sea is"])  # type: ignore[operator]
        assert len(call(["the see is"])) == 1  # type: ignore[operator]


def test_a_stop_that_the_model_does_not_know_is_none(tmp_path: Path) -> None:
    write(tmp_path, 258, added("<end>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    llama = build(tmp_path)
    assert llama.tokenizer.stop_tokens == {257}
    assert llama.text_completion(["the"], min_gen_len=2, max_gen_len=3, temperature=0)


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="vocab_size 250 and the tokenizer 258 words"):
        build(write(tmp_path / "words", 250, []))
    with pytest.raises(LlamaError, match="vocab_size 258 and the tokenizer 259 words"):
        build(write(tmp_path / "prefix", 258, added("<begin>"), prefix="<begin>"))
