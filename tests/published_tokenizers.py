# ruff: noqa: E501 (a template is one line)
"""Small tokenizers and chat templates in the forms of published families, and texts to try them with.

The tokenizers are trained here, on one paragraph; the templates have the published shapes.
"""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from llama.tokenization.chat_template import TemplateFormat
from llama.tokenization.hf_tokenizer import HFTokenizer

NOW = datetime(2026, 11, 22)
PARAGRAPH = """The quick brown fox jumps over the lazy dog, and 12345 other things happen in the meantime. It's what
they'll say: "system", "user" and "assistant" are roles. Ça va? Größe, naïve, 中文字符, emoji 😀 and <b>brackets</b>,
[lists], a || b, end_header_id, start, im_end, INST, SYS.\n\n    def f(x):\n        return x ** 2 <= 3\n"""
CUT = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Chat templates

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% generation %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = """{%- set ns = namespace(last=messages|length - 1, thoughts='') %}
{%- for message in messages[::-1] %}{% if message.role == 'user' %}{% set ns.last = loop.revindex0 %}{% break %}
{%- endif %}{% endfor %}
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content %}{% set ns.thoughts = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set ns.thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if ns.thoughts and loop.index0 > ns.last %}{{- '<think>\n' + ns.thoughts + '\n</think>\n\n' }}{% endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"""
GLUED = "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim }}{% endfor %}[/INST]"
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{% if loop.index0 % 2 %}{{ raise_exception('Roles must alternate!\nStop.') }}{% endif %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}{% endfor %}"""

# Tokenizers


def byte_level(cut: str, added: list[AddedToken], normalizer: Any = None, **bpe: Any) -> Library:
    made = Library(models.BPE(**bpe))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % cut), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [PARAGRAPH], trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens(added)
    return made


def sentencepiece(controls: list[str], *, legacy: bool) -> Library:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=names, show_progress=False)
    trained.train_from_iterator([PARAGRAPH], trainer)
    stated = json.loads(trained.to_str())
    # Some published vocabularies can put "<s>" together from pieces.
    vocab, merges = stated["model"]["vocab"], stated["model"]["merges"]
    for pair in (["s", ">"], ["<", "s>"], ["<", "/"], ["</", "s>"]):
        vocab.setdefault("".join(pair), len(vocab))
        merges.append(pair)
    stated["added_tokens"] = []
    made = Library.from_str(json.dumps(stated))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = None  # type: ignore[assignment]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in [*names[:3], *controls]])
    begin_with(made, "<s>")
    return made


def begin_with(made: Library, bos: str) -> None:
    before = [] if made.post_processor is None else [made.post_processor]
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    made.post_processor = processors.Sequence([*before, template])


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, normalized=False, special=True) for name in names]


def words(*names: str) -> list[AddedToken]:
    return [AddedToken(name, normalized=False, special=False) for name in names]


def llama3() -> Library:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made = byte_level(CUT["llama3"], special(*names), ignore_merges=True)
    begin_with(made, names[0])
    return made


def qwen() -> Library:
    names = special("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    names.extend(words("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<think>", "</think>", "brown fox"))
    return byte_level(CUT["qwen"], names, normalizers.NFC())


@dataclass(frozen=True)
class Family:
    make: Callable[[], Library]
    config: dict[str, Any]
    template: str
    roles: tuple[str, ...]  # of the dialogs that the template takes
    siblings: dict[str, Any] = field(default_factory=dict)


AGENT = """{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for d in documents or [] %}{{ d.title + ': ' + d.text + '\n' }}{% endfor %}
{%- for m in messages %}
{%- if m.role in ['tool', 'function', 'ipython'] %}{{ '<|im_start|>user\n' + m.content + ' (' + (m.name or 'it') + ')<|im_end|>\n' }}
{%- elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '</think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# Of dialogs.
USER = {"role": "user", "content": "Who are you?"}
FUNCTION = {"name": "now", "arguments": {"zone": "UTC", "n": [1, 2.5, None, True, "é"]}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "a1", "function": FUNCTION}]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}

S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"__type": "AddedToken", "content": "<unk>"}}
IM = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": True}
BEGIN = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>"},
    "add_bos_token": False,
}
FAMILIES = {
    "llama3": Family(llama3, BEGIN, LLAMA3, ("system", "user", "assistant", "user")),
    "llama2 legacy": Family(lambda: sentencepiece([], legacy=True), S, LLAMA2, ("system", "user", "assistant", "user")),
    "llama2": Family(lambda: sentencepiece([], legacy=False), S, LLAMA2, ("system", "user", "assistant", "user")),
    "qwen2": Family(qwen, IM, CHATML, ("user", "assistant", "user")),
    "qwen3": Family(qwen, IM, THINKING, ("system", "user", "assistant", "user", "assistant")),
    "mistral": Family(
        lambda: sentencepiece(["[INST]", "[/INST]"], legacy=False), S, MISTRAL, ("user", "assistant", "user")
    ),
    "glued": Family(
        lambda: sentencepiece(["[INST]", "[/INST]"], legacy=True), S, GLUED, ("user", "user", "assistant", "user")
    ),
}


@dataclass(frozen=True)
class Model:
    family: Family
    ours: HFTokenizer
    format: TemplateFormat
    theirs: Any  # transformers' tokenizer of the same files

    def rendered(self, dialog: Any) -> str:
        return self.theirs.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)

    def controls(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self.ours.special_tokens.values()]

    def readable(self, text: str) -> str:
        """`text` encoded and decoded: some families normalize it (NFC), some change spaces at control tokens."""
        if self.family.make in (llama3, qwen):
            return unicodedata.normalize("NFC", text) if self.family.make is qwen else text
        return text.replace(" ", "").replace("\u2581", "")


def save(folder: Path, made: Library, config: dict[str, Any] | None = None, /, **files: Any) -> Path:
    """Write tokenizer.json and the files beside it; return its path."""
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    files |= {} if config is None else {"tokenizer_config": config}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("model")
    path = save(folder, family.make(), {**family.config, "chat_template": family.template})
    ours = HFTokenizer(path)
    return Model(family, ours, TemplateFormat(ours, datetime.now()), PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("qwen"), qwen(), IM, generation_config={"eos_token_id": None})


SNIPPETS = ["the ", " The", "  ", "\n\n", "\n", "\t", "'LL", "1234567", "😀", "中文", "e\u0301", "\x00", "\u00a0"]
SNIPPETS += ["brown fox", "<", ">", "[", "]", "<|", "|>", "[INST", "<b>", "system", "_end|>", "\u2581", "\u1100\u1161"]
SNIPPETS += ["\ue000", "\U000f0000", "\U000f0001"]  # what stand-ins and aliases are made of
snippets = st.sampled_from(SNIPPETS)
benign = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), snippets), max_size=6).map("".join)


def is_benign(model: Model, text: str) -> bool:
    return not any(name in text for name in model.ours.special_tokens)
