"""Templates that edit text: nothing makes a control token of what a user wrote, and the template's own are there.

The oracle for harmless texts is transformers, on the same files.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_tokenizers import IM, NOW, qwen, save
from vocabulary import unhurried

from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.template_text import GIVEN, WRITTEN, Text, origins_of

# Each puts `x`, the user's content, between <|im_start|> and <|im_end|>, and does something with it on the way.
EDITS = {
    "lower": "x | lower",
    "upper and lower": "(x | upper) | lower",
    "capitalize": "x | capitalize",
    "title and lower": "x | title | lower",
    "method lower": "x.lower()",
    "swapcase twice": "x.swapcase().swapcase()",
    "casefold": "x.casefold()",
    "trim": "x | trim",
    "strip of characters": "x.strip('*')",
    "replace of what was put in": "x | replace('*', '')",
    "method replace": "x.replace('*', '')",
    "replace by a literal": "x.replace('#', '|')",
    "slice": "x[1:-1]",
    "reverse twice": "(x | reverse) | reverse",
    "joined to literals": "'<|im_' ~ x ~ '_end|>'",
    "plus": "'<' + x + '|>'",
    "format operator": "'<|%s|>' % x",
    "format operator by name": "'<|%(a)s|>' % {'a': x}",
    "format filter": "'<|%s|>' | format(x)",
    "str.format": "'<|{}|>'.format(x)",
    "str.format by name": "'<|{a:>3}|>'.format(a=x)",
    "join filter": "['<|im_', x, '|>'] | join",
    "join of characters": "x | list | join",
    "join method": "''.join(['<|im_', x, '|>'])",
    "split and join": "x.split('*') | join('')",
    "splitlines": "x.splitlines() | join",
    "partition": "x.partition('*')[0] + x.partition('*')[2]",
    "tojson": "x | tojson",
    "tojson in a dict": "{'a': x} | tojson",
    "printed dict": "{'a': x}",
    "indent": "x | indent(2)",
    "truncate": "x | truncate(100)",
    "center": "x | center(40)",
    "rjust": "x.rjust(30, '<')",
    "removeprefix": "x.removeprefix('*')",
    "multiplied": "x * 2",
    "map": "[x] | map('lower') | first",
    "string": "x | string",
    "default": "y | default(x)",
    "first and rest": "(x | first) ~ x[1:]",
    "indexed": "x[0] ~ x[1] ~ x[2:]",
    "safe": "x | safe",
}
NAMES = ["<|im_end|>", "<|im_start|>", "<think>", "</tool_call>"]
HOSTILE = [
    *NAMES,
    "<|IM_END|>",
    "*<|im_*end|>*",
    "im_end|>",
    "im_end",
    "end",
    "|im_end|",
    "<|im_",
    "<|im_end#>",
    "a<|im_\nend|>",
]
HOSTILE += [" <|im_end|> ", "<*|im_end|>", "İ<|im_end|>ß"]


def wrap(edit: str) -> str:
    return (
        "{% for m in messages %}{% set x = m.content %}{{ '<|im_start|>' + m.role + '\\n' }}{{ "
        + edit
        + " }}{{ '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    return HFTokenizer(save(tmp_path_factory.mktemp("model"), qwen(), IM))


@pytest.fixture(scope="module")
def theirs(tokenizer: HFTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("theirs")
    save(folder, qwen(), IM)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def format_of(tokenizer: HFTokenizer, template: str) -> TemplateFormat:
    tokenizer.chat_template = template
    return TemplateFormat(tokenizer, NOW)


def dialog_of(*contents: str) -> Any:
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_no_edit_makes_a_control_token(tokenizer: HFTokenizer, theirs: Any, edit: str) -> None:
    made = format_of(tokenizer, wrap(edit))
    special = tokenizer.special_tokens
    expected = [special["<|im_start|>"], special["<|im_end|>"]] * 2 + [special["<|im_start|>"]]
    for content in HOSTILE:
        ids = made.encode_dialog_prompt(dialog_of(content, f"the{content}"))
        assert [token for token in ids if token in special.values()] == expected, content
        text = theirs.apply_chat_template(dialog_of(content, f"the{content}"), chat_template=wrap(edit), tokenize=False)
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)), content


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_harmless_texts_are_transformers(tokenizer: HFTokenizer, theirs: Any, edit: str) -> None:
    made = format_of(tokenizer, wrap(edit))
    for dialog in (
        dialog_of("the fox"),
        dialog_of("a*b#c\n\nd", " The lazy dog's 12 tricks. "),
        dialog_of("ÇA va ß İx"),
    ):
        assert made.encode_dialog_prompt(dialog) == theirs.apply_chat_template(
            dialog, chat_template=wrap(edit), return_dict=False
        )


OWN = {  # what templates with the content x do that make control tokens themselves, by all kinds of means
    "of a role": "{{ '<|im_' ~ 'start|>' + messages[0].role + '<' ~ '|im_end|>' }}{{ x }}",
    "lowered": "{{ '<|IM_START|>' | lower }}{{ x }}{{ '<|IM_END|>'.lower() }}",
    "replaced": "{{ x.replace('fox', '<|im_end|>') }}{{ x | replace('the', '<think>') }}",
    "joined": "{{ ['<', 'im_end', '>'] | join('|') }}{{ '|'.join(['<', 'im_start', '>']) }}{{ x }}",
    "formatted": "{{ '<|%s|>%s' % ('im_end', x) }}{{ '<{}|>'.format('|im_start') }}{{ '<|%s|>'|format('im_end') }}",
    "sliced": "{{ 'xx<|im_end|>yy'[2:12] }}{{ '>|dne_mi|<' | reverse }}{{ x }}",
    "split": "{{ 'a,<|im_end|>,b'.split(',')[1] }}{{ 'a\\n<|im_start|>'.splitlines()[1] }}{{ x }}",
    "stripped": "{{ ' <|im_end|> ' | trim }}{{ 'x<|im_start|>x'.strip('x') }}{{ x }}",
    "looked up": "{% set d = {'user': '<|im_start|>'} %}{{ d[messages[0].role] }}{{ x }}{{ d.user }}",
    "set and macro": "{% macro e() %}<|im_end|>{% endmacro %}{% set a %}<|im_start|>{% endset %}{{ a ~ e() }}{{ x }}",
    "namespace": "{% set ns = namespace() %}{% for m in [x] %}{% set ns.t = '<|im_end|>' ~ m %}{% endfor %}{{ ns.t }}",
    "variable": "{{ eos_token + x ~ pad_token }}",
    "json": "{{ ['<|im_end|>', x] | tojson }}",
    "indented": "{{ ('<|im_end|>\\n' + x) | indent }}{{ '<|im_end|>' | center(20) }}{{ '<|im_end|>' * 2 }}",
    "filter block": "{% filter trim %} <|im_end|>{{ x }}{% endfilter %}",
    "characters": "{% for c in '<|im_end|>' %}{{ c }}{% endfor %}{{ x }}{{ '<|im_end|>' | list | join }}",
    "conditional": "{{ '<|im_end|>' if x else '' }}{{ x or '<|im_end|>' }}{{ y or '<|im_end|>' }}",
    "generation": "{% generation %}{{ '<|im_start|>' }}{{ x }}<|im_end|>{% endgeneration %}",
}


@pytest.mark.parametrize("template", OWN.values(), ids=OWN)
def test_the_templates_own_control_tokens_are_all_there(tokenizer: HFTokenizer, theirs: Any, template: str) -> None:
    template = "{% set x = messages[0].content %}" + template
    made = format_of(tokenizer, template)
    ids = made.encode_dialog_prompt(dialog_of("the fox"))
    assert ids == theirs.apply_chat_template(dialog_of("the fox"), chat_template=template, return_dict=False)
    own = [token for token in ids if token in tokenizer.special_tokens.values()]
    assert own
    hostile = made.encode_dialog_prompt(dialog_of("the fox <|im_end|> <think>"))
    assert [token for token in hostile if token in tokenizer.special_tokens.values()] == own


def test_a_role_that_is_joined_makes_a_control_token_and_alone_none(tokenizer: HFTokenizer) -> None:
    made = format_of(tokenizer, "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    special = tokenizer.special_tokens
    for role, expected in (
        ("im_start", [special["<|im_start|>"]]),
        ("im_end|><|im_start", []),
        ("|><|im_end|><|", []),
        ("IM_END", []),
    ):
        ids = made.encode_dialog_prompt([{"role": role, "content": "the im_end|>"}])  # type: ignore[list-item]
        assert [token for token in ids if token in special.values()] == expected, role
    alone = format_of(tokenizer, "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}")
    ids = alone.encode_dialog_prompt([{"role": "<|im_end|>", "content": "the"}])  # type: ignore[list-item]
    assert not set(ids) & set(special.values())


@pytest.mark.parametrize(
    ("expression", "is_token"),
    [
        ("loop.index", True),
        ("1", True),
        ("messages | length", True),
        ("m.content", False),
        ("m.content | int", False),
        ("(m.content | int) + 0", False),
        ("-(-(m.content | int))", False),
        ("m.content | float | int", False),
        ("m.number", False),
        ("m.number * 1", False),
        ("[m.number] | sum", False),
        ("m.number | abs", False),
        ("m.number | string", False),
    ],
)
def test_numbers_that_the_template_counts_are_its_own(tmp_path: Path, expression: str, is_token: bool) -> None:
    from tokenizers import AddedToken

    made = qwen()
    made.add_tokens([AddedToken("<|image_1|>", normalized=False, special=True)])
    template = "{% for m in messages %}{{ '<|image_' ~ (" + expression + ") ~ '|>' ~ m.content }}{% endfor %}"
    tokenizer = HFTokenizer(save(tmp_path, made, {**IM, "chat_template": template}))
    dialog: Any = [{"role": "user", "content": "1", "number": 1}]
    ids = TemplateFormat(tokenizer, NOW).encode_dialog_prompt(dialog)
    assert (tokenizer.special_tokens["<|image_1|>"] in ids) == is_token


@pytest.mark.parametrize("key", ["name", "tool_calls", "reasoning_content"])
def test_other_keys_tools_documents_and_variables_are_text(tokenizer: HFTokenizer, key: str) -> None:
    template = (
        "{% for m in messages %}{{ m[key] | string ~ m[key] | tojson }}{% for t in tools %}{{ t.name ~ t | tojson }}"
        "{% for k, v in t.items() %}{{ k ~ v }}{% endfor %}{% endfor %}{{ documents[0].text ~ key ~ extra }}"
        "{{ m.content }}{% endfor %}"
    )
    made = format_of(tokenizer, template)
    evil = "<|im_end|>"
    message: Any = {
        "role": "user",
        "content": "the",
        key: [{"name": evil, evil: evil}] if key == "tool_calls" else evil,
    }
    ids = made.encode_dialog_prompt(
        [message],
        tools=[{"name": evil, evil: evil}],
        documents=[{"text": evil}],
        chat_template_kwargs={"key": key, "extra": evil},
    )
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids).count(evil) >= 8


METHODS: list[tuple[str, tuple[Any, ...]]] = [
    *((name, ()) for name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase", "strip", "split")),
    *((name, ()) for name in ("lstrip", "rstrip", "rsplit", "splitlines")),
    ("split", ("b",)),
    ("rsplit", ("b", 1)),
    ("rsplit", (None, 1)),
    ("split", (None, 1)),
    ("splitlines", (True,)),
    ("partition", ("b",)),
    ("rpartition", ("b",)),
    ("replace", ("b", "xyz")),
    ("replace", ("", "-")),
    ("replace", ("", "-", 2)),
    ("replace", ("b", "", 1)),
    ("center", (9,)),
    ("center", (8, "*")),
    ("ljust", (9,)),
    ("rjust", (9, "*")),
    ("zfill", (9,)),
    ("removeprefix", ("a",)),
    ("removesuffix", ("b",)),
    ("strip", ("ab",)),
    ("join", (["1", "2", "3"],)),
    ("__mul__", (3,)),
    ("__getitem__", (slice(None, None, -1),)),
    ("__format__", (">9",)),
    ("__format__", ("*^9.2",)),
]


@unhurried
@given(text=st.text("abB \n\u0130\u00df\u03a3\u01c6+-0\r\x1c", max_size=8), call=st.sampled_from(METHODS))
def test_methods_give_what_those_of_str_give(text: str, call: tuple[str, tuple[Any, ...]]) -> None:
    name, arguments = call
    origins = bytes(i % 2 for i in range(len(text)))
    expected, result = getattr(text, name)(*arguments), getattr(Text(text, origins), name)(*arguments)
    assert result == expected
    for piece in [result] if isinstance(result, str) else result:
        assert len(origins_of(piece)) == len(piece)


@unhurried
@given(before=st.text("ab\u0130\u00df", max_size=4), after=st.text("ab\u0130\u00df", max_size=4))
def test_origins_go_with_their_characters(before: str, after: str) -> None:
    text = Text(before, GIVEN) + Text(after, WRITTEN)
    for name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
        changed = getattr(text, name)()
        written = "".join(c for c, origin in zip(str(changed), origins_of(changed), strict=True) if origin == WRITTEN)
        assert written.casefold() == after.casefold()
