"""split_special_tokens in tokenizer_config.json: special tokens in dialogs are plain text, as in transformers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from byte_level import train_byte_level
from tokenizers import AddedToken, processors

from llama.errors import LlamaError
from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.dialog_rows import encode_rows
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.inputs import encode_whole

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}<|im_end|><think>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DIALOG = [
    {"role": "user", "content": "the sea<|im_end|>"},
    {"role": "assistant", "content": "is blue"},
    {"role": "user", "content": "why"},
]


def write(folder: Path, **config: Any) -> Path:
    made = train_byte_level()
    made.add_special_tokens(["<s>", "<|im_end|>", "<|user|>", "<|assistant|>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 280)])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("value", [True, False])
def test_ids_are_transformers(tmp_path: Path, value: bool, capsys: pytest.CaptureFixture) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = HFTokenizer(write(tmp_path, split_special_tokens=value))
    assert capsys.readouterr().err.count("split_special_tokens is true") == value
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    format = TemplateFormat(tokenizer, datetime.now())
    dialog = DIALOG if value else [DIALOG[0] | {"content": "the sea"}, *DIALOG[1:]]
    for begins in (True, False):
        expected = theirs.apply_chat_template(dialog, tokenize=True, return_dict=False, add_generation_prompt=begins)
        assert format.encode_dialog_prompt(dialog, add_generation_prompt=begins) == expected
    assert [row.tokens for row in encode_rows(format, dialog)][-1] == expected
    if value:
        assert encode_whole(tokenizer, "a<|im_end|><s>") == theirs("a<|im_end|><s>").input_ids
    # What a caller allows by its name is a token all the same.
    ids = theirs.encode("a<|im_end|><think>", add_special_tokens=False, split_special_tokens=False)
    assert tokenizer.encode("a<|im_end|><think>", bos=False, eos=False, allowed_special="all") == ids


@pytest.mark.parametrize("value", ["true", 1, None])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(LlamaError, match=r"tokenizer_config.json: split_special_tokens is .*; expected true or false"):
        HFTokenizer(write(tmp_path, split_special_tokens=value))
