# ruff: noqa: E501 (a template has long lines)
"""Calls of tools and reasoning in what models write: against what templates write, in any pieces, whole or broken."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_tokenizers import AGENT, CHATML, FUNCTION, IM, NOW, TOOL, USER, qwen, save

from llama.tokenization.chat_template import TemplateFormat, make_formatter
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.tool_calls import FORMS, NO_FORM, ToolCall, ToolForm, check_calls, find_tool_form
from llama.tokenization.tool_parser import (
    ArgumentPiece,
    CallStart,
    ContentPiece,
    Delta,
    MessageParser,
    ParsedMessage,
    join_deltas,
    parse_message,
)
from llama.tokenizer import Tokenizer

THINK = "<think>", "</think>"
BY_NAME = {form.name: replace(form, reasoning=THINK) for form in (*FORMS, NO_FORM)}
LLAMA, HERMES, MISTRAL = (BY_NAME[name] for name in ("llama", "hermes", "mistral"))
CALLS = [FUNCTION, {"name": "add", "arguments": {"text": '</tool_call>; {"[TOOL_CALLS]', "deep": {"a": [{}]}}}]

# What published templates write for an assistant's message, cut out of them, after what they explain to the model.

QWEN_2_5 = r"""{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}
{%- for message in messages %}{{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
{%- endfor %}"""
QWEN_3 = r"""{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if message.reasoning_content %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}"""
NEMO = r"""{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
{%- endfor %}"""
MINISTRAL = r"""{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- message['content'] or '' }}
            {%- for tool in message['tool_calls'] %}
                {{- '[TOOL_CALLS]' }}
                {%- set name = tool['function']['name'] %}
                {%- set arguments = tool['function']['arguments'] %}
                {{- name + '[ARGS]' + arguments|tojson|safe }}
            {%- endfor %}
        {{- eos_token }}
    {%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
{%- endfor %}"""
LLAMA_3_1 = r"""{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.tool_calls %}
        {%- set tool_call = message.tool_calls[0].function %}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
            {{- "<|eot_id|>" }}
    {%- else %}{{- message['content'] + '<|eot_id|>' }}{%- endif %}
{%- endfor %}"""
# The template, its form, what stands before and after an assistant's text, whether that may have content and reasoning.
TEMPLATES: dict[str, tuple[str, str, str, str, bool, bool]] = {
    "Qwen2.5": (QWEN_2_5, "hermes", "<|im_start|>assistant\n", "<|im_end|>", True, False),
    "Qwen3": (QWEN_3, "hermes", "<|im_start|>assistant\n", "<|im_end|>", True, True),
    "Nemo": (NEMO, "mistral", "[/INST]", "</s>", False, False),
    "Ministral": (MINISTRAL, "mistral", "[/INST]", "</s>", True, False),
    "Llama 3.1": (LLAMA_3_1, "llama", "assistant<|end_header_id|>\n\n", "<|eot_id|>", False, False),
}


def written_by(template: str, message: Any, before: str, after: str) -> str:
    """What a model would have written for the message, by transformers' rendering of the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template([[USER, message]], chat_template=template, eos_token="</s>")
    text: str = rendered[0][0]
    return text.rpartition(before)[2].rpartition(after)[0]


def message_of(calls: list[Any], content: str = "", reasoning: str | None = None) -> dict[str, Any]:
    entries = [{"type": "function", "id": "abcdefgh1", "function": call} for call in calls]
    message = {"role": "assistant", "content": content, "tool_calls": entries}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def read(parsed: ParsedMessage) -> list[dict[str, Any]]:
    return [{"name": call.name, "arguments": json.loads(call.arguments)} for call in parsed.tool_calls]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_write_is_read_back(name: str) -> None:
    template, form_name, before, after, with_content, with_reasoning = TEMPLATES[name]
    form = find_tool_form(template)
    assert form.name == form_name
    for calls in [CALLS[:1], CALLS[1:], *([] if form_name == "llama" else [CALLS])]:
        for content in ["", *(["Let me see.", " <tool_ {"] if with_content else [])]:
            for reasoning in [None, *(["What?\n\nHm."] if with_reasoning else [])]:
                text = written_by(template, message_of(calls, content, reasoning), before, after)
                parsed = parse_message(text, form, with_tools=True)
                assert read(parsed) == calls
                assert (parsed.content, parsed.reasoning_content) == (content, reasoning)
                assert all(call.arguments in text for call in parsed.tool_calls)
                kept = text if reasoning is None else text.partition("</think>\n\n")[2]
                assert parse_message(text, form, with_tools=False) == ParsedMessage(kept, reasoning)


QWEN_SCHEMA = {  # transformers' own, which its server reads the answers of Qwen 2 and 3 by
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>)", "content": "text"},
    },
}
QWEN_TEXTS = [
    "Hello.",
    "<think>\nHm.\n</think>\n\nHello.",
    '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>',
    'See.\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "b", "arguments": {"x": [1]}}\n</tool_call>',
    '<think>\na\nb\n</think>\n\nSee.\n<tool_call>\n{"arguments": {}, "name": "a"}\n</tool_call>',
]


@pytest.mark.parametrize("text", QWEN_TEXTS)
def test_answers_are_read_as_transformers_server_reads_them(text: str) -> None:
    from transformers.utils.chat_parsing import parse_response

    theirs = parse_response(text, QWEN_SCHEMA, prefix="")
    ours = parse_message(text, HERMES, with_tools=True)
    assert read(ours) == [call["function"] for call in theirs.get("tool_calls", [])]
    assert ours.content == theirs.get("content", "").lstrip("\n")
    assert (ours.reasoning_content or "") == theirs.get("reasoning_content", "").strip("\n")


# --- any text, in any pieces --------------------------------------------------------------------------------------

CALL_TEXT = '{"name": "f", "arguments": {"a": "}\\"<"}}'
PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|eom_id|>",
    "<think>",
]
PARTS += ["</think>", "\n", " ", ";", "[", "]", "{", "}", '"', "\\", ",", ":", "f", "name", "<", "text", CALL_TEXT]
PARTS += [CALL_TEXT.replace("arguments", "parameters"), f"<tool_call>\n{CALL_TEXT}\n</tool_call>", "f[ARGS]{}"]
PARTS += [f"[TOOL_CALLS][{CALL_TEXT}, {CALL_TEXT}]", '{"name": "f", "arguments": {"a": NaN}}', "[TOOL_CALLS]f[ARGS]{}"]
messages = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)
forms = st.sampled_from([*BY_NAME.values()])


def in_pieces(text: str, cuts: list[int], form: ToolForm, with_tools: bool, **options: Any) -> list[list[Delta]]:
    """The deltas of each push, and of flush."""
    parser = MessageParser(form, with_tools, random=Random(0), **options)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [*(parser.push(text[a:b]) for a, b in pairwise(places)), parser.flush()]


@settings(deadline=None, max_examples=400)
@given(messages, st.lists(st.integers(0, 300), max_size=8), forms, st.booleans(), st.booleans())
@example(f"[TOOL_CALLS][{CALL_TEXT}]", [3], MISTRAL, True, False)
def test_pieces_joined_are_the_whole(
    text: str, cuts: list[int], form: ToolForm, with_tools: bool, in_reasoning: bool
) -> None:
    whole = parse_message(text, form, with_tools, in_reasoning=in_reasoning, random=Random(0))
    for places in (cuts, [*range(len(text))]):
        deltas = in_pieces(text, places, form, with_tools, in_reasoning=in_reasoning)
        assert join_deltas(delta for batch in deltas for delta in batch) == whole
    assert all(json.loads(call.arguments) is not None for call in whole.tool_calls)


@settings(deadline=None, max_examples=300)
@given(messages, forms)
def test_nothing_is_lost(text: str, form: ToolForm) -> None:
    """All is in the parts, but for white space, marks, and keys of a call's JSON."""
    plain = replace(form, reasoning=None)
    parsed = parse_message(text, plain, with_tools=True)
    if not parsed.tool_calls:
        assert parsed.content == text
    assert parse_message(text, plain, with_tools=False) == ParsedMessage(text)
    wanted = sum(not character.isspace() for character in text)
    found = sum(not character.isspace() for character in parsed.content)
    calls = sum(len(f"{call.name}{call.arguments}") for call in parsed.tool_calls)
    overhead = len('<tool_call>{"name": "", "parameters": }</tool_call>') + len("<|python_tag|>")
    assert found <= wanted <= found + calls + overhead * len(parsed.tool_calls)


def test_content_is_shown_at_once_and_calls_when_they_are_whole() -> None:
    text = f"See <b>.\n<tool_call>\n{CALL_TEXT}\n</tool_call>"
    batches = in_pieces(text, [*range(len(text))], HERMES, True)
    shown = [delta for batch in batches[: len("See <b>.") + 1] for delta in batch]
    assert "".join(delta.text for delta in shown if isinstance(delta, ContentPiece)) == "See <b>."
    *before, last, flushed = batches
    assert not [delta for batch in before for delta in batch if not isinstance(delta, ContentPiece)]
    assert [type(delta) for delta in last] == [CallStart, ArgumentPiece]
    assert flushed == []


@pytest.mark.parametrize(("text", "shown"), [('{"answer": 4', '{"answer":'), ("def f():\n", "def f():"), ("{x", "{x")])
def test_other_json_is_not_held_back(text: str, shown: str) -> None:
    parser = MessageParser(LLAMA, with_tools=True)
    deltas = [delta for character in text for delta in parser.push(character)]
    assert join_deltas(deltas).content.startswith(shown)


def test_a_long_call_is_read_in_linear_time() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "\\n[{" * 20_000 + '"}}</tool_call>'
    parser = MessageParser(HERMES, with_tools=True)
    deltas = [delta for place in range(0, len(text), 2) for delta in parser.push(text[place : place + 2])]
    assert len(join_deltas(deltas).tool_calls[0].arguments) == 80_009


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def is_call(text: str) -> bool:
    """By Python's own reader of JSON."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs) and dict(pairs).keys() & {"name", "arguments"}:
            raise ValueError
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=int)
    except ValueError:
        return False
    arguments = value.get("arguments") if isinstance(value, dict) and value.keys() == {"name", "arguments"} else None
    name = value.get("name") if isinstance(arguments, dict) else None
    return isinstance(name, str) and name != "" and name.isprintable()


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.text(), json_values, max_size=3),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(0, 400),
    st.sampled_from([None, "", "x", "1", "}", "{", '"', "\\", ",", " ", "\n"]),
)
def test_json_is_what_python_reads(
    arguments: dict[str, Any], indent: int | None, ascii_: bool, place: int, change: str | None
) -> None:
    """Whole, and with a character replaced."""
    text = json.dumps({"name": "f", "arguments": arguments}, indent=indent, ensure_ascii=ascii_)
    if change is not None:
        place %= len(text)
        text = text[:place] + change + text[place + 1 :]
    parsed = parse_message(f"<tool_call>{text}</tool_call>", HERMES, with_tools=True)
    if is_call(text.strip()):
        assert read(parsed) == [json.loads(text)]
        assert parsed.content == ""
    else:
        assert parsed == ParsedMessage(f"<tool_call>{text}</tool_call>")


# --- what is a call, and what isn't ---------------------------------------------------------------------------------

P = '{"name": "f", "parameters": {"a": 1}}'
A = '{"name": "f", "arguments": {"a": 1}}'
F = '{"a": 1}'
VALID: list[tuple[ToolForm, str, str, int]] = [
    (LLAMA, P, "", 1),
    (LLAMA, f"\n {P} \n", "", 1),
    (LLAMA, f"<|python_tag|>{P}<|eom_id|>", "", 1),
    (LLAMA, f"<|python_tag|>{P}; {P};{P}<|eot_id|>", "", 3),
    (LLAMA, f"I look. <|python_tag|>{P}", "I look.", 1),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", 1),
    (LLAMA, A, "", 1),
    (HERMES, f"<tool_call>{A}</tool_call> <tool_call>\n{A}\n</tool_call>\n", "", 2),
    (HERMES, f"a\n<tool_call>{A}</tool_call>\nb\n", "a\nb\n", 1),
    (HERMES, f"<tool_call>{A}</tool_call>\nb", "b", 1),
    (HERMES, f"<tool_call>{A}\n", "", 1),
    (HERMES, f"<tool_call> is a mark <tool_call>{A}</tool_call>", "<tool_call> is a mark", 1),
    (MISTRAL, f"[TOOL_CALLS] [{A}, {A}]", "", 2),
    (MISTRAL, f"a[TOOL_CALLS]f[ARGS]{F}[TOOL_CALLS]f[CALL_ID]abc[ARGS]{F}", "a", 2),
]


@pytest.mark.parametrize(("form", "text", "content", "count"), VALID)
def test_calls(form: ToolForm, text: str, content: str, count: int) -> None:
    parsed = parse_message(text, form, with_tools=True)
    assert read(parsed) == [{"name": "f", "arguments": {"a": 1}}] * count
    assert parsed.content == content
    assert parse_message(text, form, with_tools=False) == ParsedMessage(text)


INVALID: list[tuple[ToolForm, str]] = [
    (LLAMA, f"{P} is what I say"),
    (LLAMA, f"I say {P}"),
    (LLAMA, f"{P}; and"),
    (LLAMA, '<|python_tag|>brave_search.call(query="a")'),
    (LLAMA, "<|python_tag|>print(1)"),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}'),
    (LLAMA, '{"name": "f", "parameters": {"a": 1},}'),
    (LLAMA, '{"name": "f", "parameters": [1]}'),
    (LLAMA, '{"name": "f", "parameters": "{}"}'),
    (LLAMA, '{"name": "f", "parameters": {}, "arguments": {}}'),
    (LLAMA, '{"name": "f", "parameters": {}, "parameters": {}}'),
    (LLAMA, '{"name": "f", "parameters": {}, "age": 3}'),
    (LLAMA, '{"name": "f"}'),
    (LLAMA, '{"name": "", "parameters": {}}'),
    (LLAMA, '{"name": "\\ud800", "parameters": {}}'),
    (LLAMA, '{"name": 3, "parameters": {}}'),
    (LLAMA, '{"parameters": {}}'),
    (LLAMA, '{"name": "f", "parameters": {"a": NaN}}'),
    (LLAMA, '{"name": "f", "parameters": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}"),
    (HERMES, P.join(("<tool_call>", "</tool_call>"))),
    (HERMES, "<tool_call>\n<function=f>\n</function>\n</tool_call>"),
    (HERMES, f"<tool_call>{A}</tool"),
    (HERMES, f"{A}"),
    (MISTRAL, f"[TOOL_CALLS][{A}, 3]"),
    (MISTRAL, f"[TOOL_CALLS]{A}"),
    (MISTRAL, "[TOOL_CALLS]f[ARGS][1]"),
    (MISTRAL, "[TOOL_CALLS]f g[ARGS]{}"),
    (MISTRAL, "[TOOL_CALLS]f"),
    (BY_NAME["none"], f"<tool_call>{A}</tool_call>"),
]


@pytest.mark.parametrize(("form", "text"), INVALID)
def test_what_is_no_call_stays_content(form: ToolForm, text: str) -> None:
    assert parse_message(text, form, with_tools=True) == ParsedMessage(text)


REASONING: list[tuple[str, bool, str | None, str]] = [
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
    ("\n<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
    ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", False, None, "Yes."),
    ("<think>\nHm. <tool_call>", False, "Hm. <tool_call>", ""),
    ("I <think> so.</think>", False, None, "I <think> so.</think>"),
    ("</think>Yes.", False, None, "</think>Yes."),
]


@pytest.mark.parametrize(("text", "in_reasoning", "reasoning", "content"), REASONING)
@pytest.mark.parametrize("with_tools", [False, True])
def test_reasoning(text: str, in_reasoning: bool, reasoning: str | None, content: str, with_tools: bool) -> None:
    parsed = parse_message(text, HERMES, with_tools, in_reasoning=in_reasoning)
    assert parsed == ParsedMessage(content, reasoning)
    assert parse_message(text, replace(HERMES, reasoning=None), with_tools) == ParsedMessage(text)


# --- the form of a model ------------------------------------------------------------------------------------------


def test_the_form_is_that_of_the_template_or_the_vocabulary(tmp_path: Path, small: Tokenizer) -> None:
    def find(template: str | None) -> ToolForm:
        path = save(tmp_path, qwen(), {**IM, "chat_template": template})
        return find_tool_form(TemplateFormat(HFTokenizer(path), NOW))

    assert [find(template).name for template in (AGENT, CHATML, None)] == ["hermes"] * 3
    assert find(NEMO).name == "mistral"  # the template, and not the vocabulary
    assert find(AGENT).reasoning == THINK
    assert find("{{ '<tool_call>\n<function=' + messages[0].tool_calls[0].name }}").name == "none"
    assert find_tool_form(small).name == find_tool_form("").name == "none"


def test_the_form_of_llama_s_own_tokenizers(small_path: Path) -> None:
    for is_llama_3_1, name in ((False, "none"), (True, "llama")):
        tokenizer = Tokenizer(small_path, is_llama_3_1=is_llama_3_1)
        assert find_tool_form(tokenizer).name == find_tool_form(make_formatter(tokenizer, NOW)).name == name


@pytest.fixture
def small_path(tmp_path: Path) -> Path:
    from tiny import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer.model")
    return tmp_path / "tokenizer.model"


def test_ids_have_the_form_of_the_model_and_come_from_the_caller() -> None:
    text = f"<tool_call>{A}</tool_call>" * 2
    ids = [call.id for call in parse_message(text, HERMES, True, random=Random(1)).tool_calls]
    assert ids == [call.id for call in parse_message(text, HERMES, True, random=Random(1)).tool_calls]
    others = [call.id for call in parse_message(text, HERMES, True).tool_calls]
    assert len({*ids, *others}) == 4
    assert all(id_.startswith("call_") and len(id_) == 29 and id_[5:].isalnum() for id_ in ids + others)
    (call,) = parse_message(f"[TOOL_CALLS][{A}]", MISTRAL, True).tool_calls
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_names_that_are_no_tool_are_told() -> None:
    calls = [ToolCall("a", "now", "{}"), ToolCall("b", "then", "{}")]
    assert check_calls(calls, [TOOL]) == check_calls(calls, [{"name": "now"}]) == ["then"]
