"""Where a template writes several tokens that stop generation, an answer is learnt up to the first: there it ends."""

import json
from pathlib import Path

import pytest
from published_tokenizers import IM, NOW, qwen, save

from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.dialog_rows import encode_rows
from llama.tokenization.hf_tokenizer import HFTokenizer

DIALOG = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
START = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
END = "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("written", "stops", "learnt"),
    [
        ("'<|im_end|><|endoftext|>'", ("<|im_end|>", "<|endoftext|>"), "<|im_end|>"),
        ("'<|im_end|>\n<|endoftext|>\n'", ("<|im_end|>", "<|endoftext|>"), "<|im_end|>"),
        ("'<|endoftext|>\n<|im_end|>\n'", ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
        ("'<|im_end|><|endoftext|>'", ("<|endoftext|>",), "<|im_end|><|endoftext|>"),
    ],
)
def test_the_first_stop_is_the_end(tmp_path: Path, written: str, stops: tuple[str, ...], learnt: str) -> None:
    path = save(tmp_path, qwen(), {**IM, "chat_template": START + written + END})
    ids = HFTokenizer(path).special_tokens
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[name] for name in stops]}))
    tokenizer = HFTokenizer(path)
    (row,) = encode_rows(TemplateFormat(tokenizer, NOW), DIALOG)
    text = tokenizer.decode([token for token, flag in zip(row.tokens, row.learnt, strict=True) if flag])
    assert text == "".join(message["content"] + learnt for message in DIALOG[1::2])
