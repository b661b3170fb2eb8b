# ruff: noqa: E501 (a template is one line)
"""The rows that a dialog is trained on: those of transformers, and the answers and their ends are learnt."""

from pathlib import Path
from typing import Any

import pytest
from published_tokenizers import AGENT, CALL, IM, LLAMA2, NOW, THINKING, TOOL, USER, S, qwen, save, sentencepiece

from llama.errors import LlamaError
from llama.tokenization.chat_template import TemplateFormat, make_formatter
from llama.tokenization.dialog_rows import encode_rows
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY_THOUGHTS = CHATML.replace(
    "m.role + '\n' + m.content",
    "m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content",
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
DIALOG: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A brown fox, 12 years old."},
    {"role": "user", "content": "Ça va?"},
    {"role": "assistant", "content": "Oui 😀 <|im_end|>."},
]


def make(tmp_path: Path, template: str, **config: Any) -> tuple[TemplateFormat, Any]:
    from transformers import PreTrainedTokenizerFast

    path = save(tmp_path, qwen(), {**IM, "chat_template": template, **config})
    return TemplateFormat(HFTokenizer(path), NOW), PreTrainedTokenizerFast.from_pretrained(tmp_path)


def texts_of(made: TemplateFormat, row: Any) -> list[str]:
    """The texts of the runs of tokens that are learnt."""
    runs: list[list[int]] = []
    for i, (token, learnt) in enumerate(zip(row.tokens, row.learnt, strict=True)):
        if learnt:
            runs = [*runs[:-1], [*runs[-1], token]] if i and row.learnt[i - 1] else [*runs, [token]]
    return [made.tokenizer.decode(run) for run in runs]


def test_marked_rows_are_transformers(tmp_path: Path) -> None:
    made, theirs = make(tmp_path, MARKED)
    dialog = [*DIALOG[:-1], {"role": "assistant", "content": "Oui 😀."}]
    expected = theirs.apply_chat_template(dialog, return_dict=True, return_assistant_tokens_mask=True)
    (row,) = encode_rows(made, dialog)
    assert row.tokens == expected["input_ids"]
    assert [*map(int, row.learnt)] == expected["assistant_masks"]


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_the_templates_end_is_learnt_whatever_eos_is(tmp_path: Path, eos: str) -> None:
    made, theirs = make(tmp_path, CHATML, eos_token=eos)
    (row,) = encode_rows(made, DIALOG)
    harmless = [*DIALOG[:-1], {"role": "assistant", "content": "Oui."}]
    assert encode_rows(made, harmless)[0].tokens == theirs.apply_chat_template(harmless, return_dict=False)
    assert texts_of(made, row) == ["A brown fox, 12 years old.<|im_end|>", "Oui 😀 <|im_end|>.<|im_end|>"]
    prompt = made.encode_dialog_prompt(DIALOG[:-1])
    assert row.tokens[: len(prompt)] == prompt and row.learnt[len(prompt)] and not row.learnt[len(prompt) - 1]


def test_thoughts_that_the_template_writes_are_learnt(tmp_path: Path) -> None:
    made, theirs = make(tmp_path, EMPTY_THOUGHTS)
    (row,) = encode_rows(made, DIALOG[:3])
    assert row.tokens == theirs.apply_chat_template(DIALOG[:3], return_dict=False)
    assert texts_of(made, row) == ["<think>\n\n</think>\n\nA brown fox, 12 years old.<|im_end|>"]


def test_an_answer_that_is_written_otherwise_later_has_a_row_of_its_own(tmp_path: Path) -> None:
    made, theirs = make(tmp_path, THINKING)
    dialog: Any = [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        USER,
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nno"},
    ]
    first, whole = encode_rows(made, dialog)
    assert first.tokens == theirs.apply_chat_template(dialog[:2], return_dict=False)
    assert whole.tokens == theirs.apply_chat_template(dialog, return_dict=False)
    assert texts_of(made, first) == ["hm\n</think>\n\nyes<|im_end|>"]
    assert texts_of(made, whole) == ["so\n</think>\n\nno<|im_end|>"]


def test_a_template_without_a_token_for_the_end_is_learnt_to_its_end(tmp_path: Path) -> None:
    made, _ = make(tmp_path, PLAIN)
    (row,) = encode_rows(made, DIALOG[:3])
    assert texts_of(made, row)[0].endswith("A brown fox, 12 years old.\n")


def test_calls_are_learnt_with_the_tools_before_them(tmp_path: Path) -> None:
    made, theirs = make(tmp_path, AGENT)
    dialog: Any = [USER, CALL]
    (row,) = encode_rows(made, dialog, tools=[TOOL])
    assert row.tokens == theirs.apply_chat_template(dialog, tools=[TOOL], return_dict=False)
    (said,) = texts_of(made, row)
    assert said.startswith("<tool_call>") and said.endswith("</tool_call><|im_end|>")


def test_sentencepiece_rows_end_with_eos(tmp_path: Path) -> None:
    for legacy in (True, False):
        made_of = sentencepiece([], legacy=legacy)
        made = TemplateFormat(HFTokenizer(save(tmp_path, made_of, {**S, "chat_template": LLAMA2})), NOW)
        (row,) = encode_rows(made, DIALOG)
        assert row.tokens == made.encode_dialog_prompt(DIALOG, add_generation_prompt=False)
        ends = [i for i, token in enumerate(row.tokens) if token == made.tokenizer.eos_id]
        assert len(ends) == 2 and all(row.learnt[i] for i in ends)
        first = [made.tokenizer.decode([token]) for token, learnt in zip(row.tokens, row.learnt, strict=True) if learnt]
        assert "A" in "".join(first)[:4] and "INST" not in "".join(first)


def test_metas_layout_learns_all_answers(small: Tokenizer) -> None:
    made = make_formatter(small, NOW)
    (row,) = encode_rows(made, DIALOG)
    assert row.tokens == made.encode_dialog_prompt(DIALOG, add_generation_prompt=False)
    learnt = [token for token, flag in zip(row.tokens, row.learnt, strict=True) if flag]
    assert small.decode(learnt) == "A brown fox, 12 years old.<|eot_id|>Oui 😀 <|im_end|>.<|eot_id|>"


def test_a_template_that_hides_where_an_answer_begins_is_told(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(LlamaError, match=r"message 2 of 2: .* where it begins"):
        encode_rows(make(tmp_path, template)[0], [USER, {"role": "assistant", "content": "a"}])  # type: ignore[list-item]
