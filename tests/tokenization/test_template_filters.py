"""Filters of templates that are written anew here give transformers' texts, whatever their arguments."""

from pathlib import Path

import pytest
from published_tokenizers import IM, NOW, qwen, save

from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.hf_tokenizer import HFTokenizer

CONTENTS = ["one two one\n\n  three one", "é\r\nab\n", "", "\n", "it's 'x' <b>&\tone"]
EXPRESSIONS = [
    "c | replace('one', 'two')",
    "c | replace('one', 'two', 1)",
    "c | replace('', '-', 2)",
    "c | replace('o', '', 0)",
    "c | indent",
    "c | indent(2, true)",
    "c | indent(3, false, true)",
    "c | indent('> ', true, true)",
    "c | tojson",
    "{'a': c, 'b': [1, c]} | tojson",
    "{'b': c, 'a': 1} | tojson(indent=2)",
    "[c, 'é'] | tojson(true)",
    "{'b': c, 'a': 1} | tojson(sort_keys=true)",
    "{'b': c, 'a': 1} | tojson(separators=(',', ':'))",
    "messages | join(', ', attribute='role')",
    "[c, 1, none] | join('|')",
    "[c] | join",
    "c | join('-')",
    "[1, 2, 3] | sum(start=4)",
    "[1, 2] | sum",
    "c | title",
    "2.5 | round | string",
    "2.345 | round(2, 'floor')",
    "25 | round(-1) | int",
    "c | trim | upper",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_texts_are_transformers(tmp_path: Path, expression: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = "{% set c = messages[0].content %}{{ c }}[{{ " + expression + " }}]"
    path = save(tmp_path, qwen(), {**IM, "chat_template": template})
    made, theirs = TemplateFormat(HFTokenizer(path), NOW), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for content in CONTENTS:
        dialog = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
        assert str(made.render(dialog)) == theirs.apply_chat_template(dialog, tokenize=False)
