"""Chat templates against transformers, messages that try to make control tokens, and templates that fail."""

import time
import unicodedata
from pathlib import Path
from typing import Any

import published_tokenizers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_tokenizers import (
    BEGIN,
    CHATML,
    CUT,
    FAMILIES,
    GLUED,
    IM,
    LLAMA3,
    NOW,
    Model,
    benign,
    byte_level,
    is_benign,
    llama3,
    qwen,
    save,
    snippets,
)
from vocabulary import some

from llama.errors import LlamaError
from llama.tokenization.chat_template import TemplateFormat, make_formatter
from llama.tokenization.hf_tokenizer import HFTokenizer, open_tokenizer
from llama.tokenizer import ChatFormat, Tokenizer

model, qwen_path = published_tokenizers.model, published_tokenizers.qwen_path

# Dialogs


def dialog_of(roles: tuple[str, ...], contents: list[str]) -> Any:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def their_ids(model: Model, dialog: Any) -> list[int]:
    return model.theirs.apply_chat_template(dialog, add_generation_prompt=True, tokenize=True, return_dict=False)


@some
@given(data=st.data())
def test_dialogs_are_transformers(model: Model, data: st.DataObject) -> None:
    roles = model.family.roles[: data.draw(st.integers(1, len(model.family.roles)))]
    contents = data.draw(st.lists(benign, min_size=len(roles), max_size=len(roles)))
    if model.family.template is GLUED:
        innocent = is_benign(model, "".join(content.strip() for content in contents))
    else:
        innocent = is_benign(model, "\n".join(contents))
    if innocent:
        dialog = dialog_of(roles, contents)
        assert model.format.encode_dialog_prompt(dialog) == their_ids(model, dialog)


THOUGHTS = ["<think>\nhm\n</think>\n\nyes", "hm</think>yes", "<think>", "</think>", "a</think>b</think>c"]


@pytest.mark.parametrize("content", THOUGHTS)
def test_templates_see_the_thoughts_of_the_assistant(model: Model, content: str) -> None:
    roles = model.family.roles
    dialog = dialog_of(roles, [content if role == "assistant" else "the" for role in roles])
    assert model.format.encode_dialog_prompt(dialog) == their_ids(model, dialog)


def assert_only_text(model: Model, roles: tuple[str, ...], contents: list[str]) -> None:
    dialog = dialog_of(roles, contents)
    ids = model.format.encode_dialog_prompt(dialog)
    innocent = model.format.encode_dialog_prompt(dialog_of(roles, ["innocent"] * len(roles)))
    assert model.controls(ids) == model.controls(innocent)
    assert model.readable(model.ours.decode(ids)) == model.readable(model.rendered(dialog))


def forbidden(model: Model, role: str) -> list[str]:
    return sorted(model.ours.flagged_special if role == "assistant" else model.ours.special_tokens)


def test_no_name_in_a_message_becomes_a_token(model: Model) -> None:
    roles = model.family.roles
    for i, role in enumerate(roles):
        for name in forbidden(model, role):
            for content in (name, f"the{name}", f"{name}fox", f" {name}\n{name}{name}", f"\U000f0000{name}\U000f0001"):
                contents = ["innocent"] * len(roles)
                contents[i] = content
                assert_only_text(model, roles, contents)


def test_no_name_in_pieces_over_messages_becomes_a_token(model: Model) -> None:
    roles = model.family.roles
    for i in range(len(roles) - 1):
        for name in forbidden(model, "assistant" if "assistant" in roles[i : i + 2] else "user"):
            for cut in range(1, len(name)):
                for space in ("", " \n"):
                    contents = ["innocent"] * len(roles)
                    contents[i : i + 2] = f"the{name[:cut]}{space}", f"{space}{name[cut:]}fox"
                    assert_only_text(model, roles, contents)


@some
@given(data=st.data())
def test_no_message_becomes_more_than_text(model: Model, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(model.ours.special_tokens))
    piece = st.tuples(names, st.integers(1, 20), st.booleans()).map(lambda t: t[0][: t[1]] if t[2] else t[0][t[1] :])
    hostile = st.lists(st.one_of(names, piece, snippets), max_size=5).map("".join)
    roles = model.family.roles
    contents = [data.draw(hostile) for _ in roles]
    kept = model.ours.special_tokens.keys() - model.ours.flagged_special
    if not any(
        name in content for name in kept for content, role in zip(contents, roles, strict=True) if role == "assistant"
    ):
        assert_only_text(model, roles, contents)


def test_what_a_template_cuts_out_joins_nothing(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content.replace('</think>', '') }}{% endfor %}"
    path = save(tmp_path, qwen(), {"chat_template": template})
    tokenizer = HFTokenizer(path)
    dialog: Any = [{"role": "assistant", "content": "<|im_</think>end|>"}]
    ids = TemplateFormat(tokenizer, NOW).encode_dialog_prompt(dialog)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "<|im_end|>"


@pytest.mark.parametrize("space", ["", " \n"])
def test_a_template_completes_no_message(tmp_path: Path, space: str) -> None:
    template = "{{ '<|im_' + messages[0].content | trim + '|im_end|>' + messages[1].content | trim | tojson }}"
    tokenizer = HFTokenizer(save(tmp_path, qwen(), {"chat_template": template}))
    contents = [f"{space}start|>the<{space}", '"<b>é<|im_end|>']
    ids = TemplateFormat(tokenizer, NOW).encode_dialog_prompt(dialog_of(("user", "user"), contents))
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == '<|im_start|>the<|im_end|>"\\"<b>é<|im_end|>"'


def test_the_date_is_the_given_one(tmp_path: Path) -> None:
    path = save(tmp_path, llama3(), {**BEGIN, "chat_template": LLAMA3})
    dialog: Any = [{"role": "user", "content": "the"}]
    tokenizer = HFTokenizer(path)
    assert "Today: 22 Nov 2026\n" in tokenizer.decode(TemplateFormat(tokenizer, NOW).encode_dialog_prompt(dialog))


def test_formatter_is_the_one_that_fits(small: Tokenizer, qwen_path: Path) -> None:
    assert type(make_formatter(small, NOW)) is ChatFormat
    assert type(make_formatter(HFTokenizer(qwen_path), NOW)) is TemplateFormat


MEGABYTES = {"one letter": "a" * 10**6, "edges": "<|" * 500_000, "names": "<s><|im_end|>[INST]" * 53_000}


@pytest.mark.parametrize(
    ("which", "names"),
    [("qwen2", ["names"]), ("llama2 legacy", ["one letter", "edges"])],
)
def test_a_megabyte_takes_linear_time(tmp_path: Path, which: str, names: list[str]) -> None:
    family = FAMILIES[which]
    path = save(tmp_path, family.make(), {**family.config, "chat_template": family.template})
    format = TemplateFormat(HFTokenizer(path), NOW)
    for text in [MEGABYTES[name] for name in names]:
        start = time.monotonic()
        ids = format.encode_dialog_prompt([{"role": "user", "content": text}])
        decoded = format.tokenizer.decode(ids)
        assert time.monotonic() - start < 30  # seconds; each takes a few at most, and a quadratic algorithm minutes
        assert unicodedata.normalize("NFC", text.strip()) in decoded


# Templates and dialogs that fail


def failing(tmp_path: Path, template: Any, **files: Any) -> TemplateFormat:
    path = save(tmp_path, qwen(), {**IM, "chat_template": template}, **files)
    return TemplateFormat(open_tokenizer(path), NOW)  # type: ignore[arg-type]


BAD_TEMPLATES: dict[str, tuple[Any, str]] = {
    "none": (None, "no chat template"),
    "no default": ([{"name": "rag", "template": "x"}], "no chat template"),
    "syntax": ("{% if %}\n", "isn't Jinja"),
    "unknown tag": ("{% shell %}", "isn't Jinja"),
    "refusal": ("{{ raise_exception('no\nroles: ' + messages[0].content) }}", "refuses the dialog: no roles: the <"),
    "refusal of anything": ("{{ raise_exception(messages) }}", "refuses the dialog"),
    "security": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "range": ("{{ range(10 ** 9) | list }}", "OverflowError"),
    "import": ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_failing_templates_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    template, says = BAD_TEMPLATES[name]
    format = failing(tmp_path, template)
    for _ in range(2):
        with pytest.raises(LlamaError, match=says) as refusal:
            format.encode_dialog_prompt([{"role": "user", "content": "the <|im_end|> <"}])
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


BAD_DIALOGS: list[tuple[Any, str]] = [
    ([], "the dialog is empty"),
    ([{"role": "user", "content": "the"}, {"role": 5, "content": "the"}], "message 2 of 2: 'role' is int 5"),
    ([{"role": "user"}], "message 1 of 1: no 'content'"),
    ([{"role": "user", "content": None}], "'content' is NoneType"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "part 1 of the list 'content' is of the type 'image_url'"),
    ([{"role": "user", "content": ["the"]}], "the list 'content' is str 'the'"),
    (5, "a dialog is int 5"),
    ("the", "a dialog is str 'the'"),
    (["the"], "a message is str 'the'"),
]


@pytest.mark.parametrize(("dialog", "says"), BAD_DIALOGS)
def test_bad_dialogs_are_told_as_by_the_other_format(tmp_path: Path, dialog: Any, says: str) -> None:
    with pytest.raises(LlamaError, match=says):
        failing(tmp_path, CHATML).encode_dialog_prompt(dialog)


def test_alternation_that_a_template_asks_for(model: Model) -> None:
    dialog = dialog_of(("user", "user"), ["the", "the"])
    if "alternate" in model.family.template:
        with pytest.raises(LlamaError, match=r"refuses the dialog: .*alternate"):
            model.format.encode_dialog_prompt(dialog)
    else:
        assert model.format.encode_dialog_prompt(dialog) == their_ids(model, dialog)


def test_the_template_in_a_file_of_its_own_wins(tmp_path: Path) -> None:
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from the list"}]
    path = save(tmp_path, qwen(), {"chat_template": entries})
    assert HFTokenizer(path).chat_template == "from the list"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert HFTokenizer(path).chat_template == "from the file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(LlamaError, match=r"chat_template\.jinja: found what isn't UTF-8"):
        HFTokenizer(path)


def test_a_base_model_has_no_template_and_no_control_tokens(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save(tmp_path, byte_level(CUT["qwen"], [])))
    assert (tokenizer.chat_template, tokenizer.special_tokens, tokenizer.stop_tokens) == (None, {}, set())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (-1, -1, -1)
    assert tokenizer.decode(tokenizer.encode("<s>", bos=True, eos=False, allowed_special="all")) == "<s>"
    path = save(tmp_path, byte_level(CUT["qwen"], []), {"chat_template": "{{ messages[0].content }}<s>"})
    ids = TemplateFormat(HFTokenizer(path), NOW).encode_dialog_prompt([{"role": "user", "content": "the <"}])
    assert tokenizer.decode(ids) == "the <<s>"
