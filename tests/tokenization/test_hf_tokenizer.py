"""tokenizer.json and chat templates, with transformers as the oracle; and messages that try to make control tokens.

The tokenizers are made here, small, in the forms of published families; the templates have the published shapes.
"""

import json
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from vocabulary import TOKENS, lines_of, unhurried, write

from llama.errors import LlamaError
from llama.tokenization.chat_template import TemplateFormat, make_formatter
from llama.tokenization.hf_tokenizer import HFTokenizer, open_tokenizer
from llama.tokenizer import ChatFormat, Tokenizer

PARAGRAPH = """The quick brown fox jumps over the lazy dog, and 12345 other things happen in the meantime. It's what
they'll say: "system", "user" and "assistant" are roles. Ça va? Größe, naïve, 中文字符, emoji 😀 and <b>brackets</b>,
[lists], a || b, end_header_id, start, im_end, INST, SYS.\n\n    def f(x):\n        return x ** 2 <= 3\n"""
NOW = datetime(2026, 11, 22)
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
some = settings(unhurried, max_examples=30)


def is_benign(model: Model, text: str) -> bool:
    return not any(name in text for name in model.ours.special_tokens)


# Texts


@some
@given(text=benign)
@example(text=" brown fox  <s")
@example(text="")
def test_ids_and_text_are_transformers(model: Model, text: str) -> None:
    if not is_benign(model, text):
        return
    ids = model.ours.encode(text, bos=False, eos=False)
    assert ids == model.theirs(text, add_special_tokens=False).input_ids
    assert model.ours.encode(text, bos=True, eos=False) == model.theirs(text).input_ids
    assert model.ours.encode(text, bos=False, eos=True) == [*ids, model.theirs.eos_token_id]
    assert model.ours.decode(ids) == model.theirs.decode(ids)


@some
@given(pieces=st.lists(st.tuples(benign, st.integers(0, 20)), max_size=4))
def test_allowed_names_become_tokens_as_in_transformers(model: Model, pieces: list[tuple[str, int]]) -> None:
    names = [*model.ours.special_tokens]
    text = "".join(part + names[i % len(names)] for part, i in pieces)
    expected = model.theirs(text, add_special_tokens=False).input_ids
    assert model.ours.encode(text, bos=False, eos=False, allowed_special="all") == expected


@some
@given(before=benign, i=st.integers(0, 20), after=benign)
@example(before="", i=1, after="")
def test_text_makes_no_control_token(model: Model, before: str, i: int, after: str) -> None:
    names = [*model.ours.special_tokens]
    name = names[i % len(names)]
    text = before + name + after
    ids = model.ours.encode(text, bos=False, eos=False)
    assert model.controls(ids) == []
    assert model.readable(model.ours.decode(ids)) == model.readable(text)
    allowed = model.ours.encode(text, bos=False, eos=False, allowed_special={name})
    assert set(model.controls(allowed)) == {model.ours.special_tokens[name]}
    with pytest.raises(LlamaError, match="disallowed_special"):
        model.ours.encode(text, bos=False, eos=False, disallowed_special="all")


def test_lone_surrogates_and_what_is_no_text(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    ids = tokenizer.encode("a\ud800b\ud83d\ude00", bos=False, eos=False)
    assert tokenizer.decode(ids) == "a\ufffdb😀"
    with pytest.raises(LlamaError, match="list"):
        tokenizer.encode(["the"], bos=False, eos=False)  # type: ignore[arg-type]
    for argument in ("allowed_special", "disallowed_special"):
        options: dict[str, Any] = {argument: "<|im_end|>"}
        with pytest.raises(LlamaError, match=argument):
            tokenizer.encode("the", bos=False, eos=False, **options)


def test_disallowed_names_are_told_unless_allowed(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    with pytest.raises(LlamaError, match=r"'<\|im_end\|>' at character 4"):
        tokenizer.encode("the <|im_end|>", bos=False, eos=False, disallowed_special={"<|im_end|>"})
    options: dict[str, Any] = {"allowed_special": {"<|im_end|>"}, "disallowed_special": "all"}
    ids = tokenizer.encode("<|im_end|>", bos=False, eos=False, **options)
    assert ids == [tokenizer.special_tokens["<|im_end|>"]]


def test_added_tokens_without_brackets_and_flag_are_words(qwen_path: Path) -> None:
    tokenizer = HFTokenizer(qwen_path)
    assert "brown fox" not in tokenizer.special_tokens
    assert len(tokenizer.encode("brown fox", bos=False, eos=False)) == 1
    assert {"<think>", "</think>", "<|fim_prefix|>", "<|im_end|>"} < tokenizer.special_tokens.keys()
    assert tokenizer.flagged_special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("normalizer", [None, normalizers.Prepend("\u2581")])
def test_flags_of_control_tokens_are_kept(tmp_path: Path, normalizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    made = byte_level(CUT["qwen"], [AddedToken("<a>", lstrip=True, rstrip=True, normalized=False, special=True)])
    made.normalizer = normalizer
    made.add_tokens([AddedToken("<b>", normalized=True, special=True, single_word=True)])
    ours = HFTokenizer(save(tmp_path, made))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("the <a>  fox <a>", "<b> fox", "<a> \n", "fox  <a> <b>"):
        ids = ours.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert set(ids) & set(ours.special_tokens.values())


def test_a_control_token_that_the_library_does_not_find_is_told(tmp_path: Path) -> None:
    made = byte_level(CUT["qwen"], [AddedToken("<b>", normalized=True, special=True)])
    made.normalizer = normalizers.Prepend("\u2581")
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert len(tokenizer.encode("<b>", bos=False, eos=False, allowed_special="all")) == 1
    with pytest.raises(LlamaError, match=r"'<b>' 0 times .* 1 times; set its 'normalized'"):
        tokenizer.encode("the<b>", bos=False, eos=False, allowed_special="all")


def test_of_names_that_begin_alike_the_longest_counts(tmp_path: Path) -> None:
    made = byte_level(CUT["qwen"], special("<a>", "<a>b", "<a>bc"))
    tokenizer = HFTokenizer(save(tmp_path, made))
    text = "<a>b<a>bc<a><a>b"
    assert tokenizer.encode(text, bos=False, eos=False, allowed_special="all") == made.encode(text).ids


def test_truncation_and_padding_of_the_file_are_for_training(tmp_path: Path) -> None:
    made = qwen()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.decode(tokenizer.encode(PARAGRAPH, bos=False, eos=False)) == unicodedata.normalize(
        "NFC", PARAGRAPH
    )


def test_what_the_tokenizer_puts_after_a_text_is_not_put_before(tmp_path: Path) -> None:
    made = llama3()
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    ids = [(name, made.token_to_id(name)) for name in names]
    made.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} {names[1]} $A {names[2]}", special_tokens=ids
    )
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("", bos=True, eos=False) == [ids[0][1], ids[1][1]]
    assert tokenizer.bos_id == tokenizer.eos_id == -1  # two tokens before a text, and no name for either
    with pytest.raises(LlamaError, match="eos=False"):
        tokenizer.encode("the", bos=True, eos=True)


def test_unknown_characters_may_become_the_unknown_token(tmp_path: Path) -> None:
    made = Library(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>"])
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("a\u4e2da", bos=False, eos=False) == [1, 0, 1]


def test_unigram_vocabularies_are_read(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("\u2581", -2.0), ("the", -3.0), *((c, -9.0) for c in "<s>the")]
    made = Library(models.Unigram([*dict(pieces).items()], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>"])
    tokenizer = HFTokenizer(save(tmp_path, made))
    assert tokenizer.encode("the", bos=False, eos=False) == made.encode("the").ids
    assert 1 not in tokenizer.encode("the <s>", bos=False, eos=False)
    assert 0 in tokenizer.encode("the é", bos=False, eos=False)
    ids = tokenizer.encode("the <s>", bos=False, eos=False, allowed_special="all")
    assert ids == made.encode("the <s>").ids
    assert tokenizer.decode(ids) == "the <s>"


# Decoding


@some
@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(model: Model, data: st.DataObject) -> None:
    tokenizer = model.ours
    text = data.draw(benign)
    ids = tokenizer.encode(text, bos=data.draw(st.booleans()), eos=False)
    ids += data.draw(st.lists(st.integers(0, tokenizer.n_words + 5)))
    stream = tokenizer.stream_decoder()
    for _ in range(2):  # flush leaves it as new
        assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == tokenizer.decode(ids)


@some
@given(text=benign)
def test_streamed_text_has_only_whole_characters(model: Model, text: str) -> None:
    stream = model.ours.stream_decoder()
    ids = model.ours.encode(text, bos=True, eos=False)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == model.ours.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_every_id_decodes_as_in_transformers(model: Model) -> None:
    tokenizer = model.ours
    for token in range(tokenizer.n_words):
        theirs = model.theirs.decode([token])
        assert tokenizer.decode([token]) == theirs
        assert tokenizer.decode([token, token]) == model.theirs.decode([token, token])
    assert tokenizer.decode(tokenizer.special_tokens.values()) == "".join(tokenizer.special_tokens)  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_are_nothing_and_negative_ones_are_refused(model: Model) -> None:
    tokenizer = model.ours
    ids = tokenizer.encode("the fox", bos=False, eos=False)
    assert tokenizer.n_words == len(model.theirs)
    assert tokenizer.decode([tokenizer.n_words, *ids, 2**40]) == "the fox"
    with pytest.raises(LlamaError, match="-1 at position 1"):
        tokenizer.decode([0, -1])
    with pytest.raises(LlamaError, match="-1"):
        tokenizer.stream_decoder().push(-1)


def test_the_other_tokenizer_has_a_stream_decoder_too(small: Tokenizer) -> None:
    stream = small.stream_decoder()
    assert stream.push(TOKENS.index(b"the")) + stream.flush() == "the"


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
    ([{"role": "user", "content": "the"}, {"role": "tool", "content": "the"}], "message 2 of 2: unknown role 'tool'"),
    ([{"role": "user"}], "message 1 of 1: no 'content'"),
    ([{"role": "user", "content": None}], "'content' is NoneType"),
    ([{"role": "user", "content": [{"type": "text", "text": "the"}]}], "'content' is list"),
    (["the"], "a message is str 'the'"),
    ([{"role": "user", "content": "".join(map(chr, range(0xF0000, 0x110000))) + "<|im_end|>"}], "private use"),
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


# Attributes and files


def test_attributes(model: Model) -> None:
    tokenizer, theirs = model.ours, model.theirs
    assert tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.bos_id == (-1 if theirs.bos_token_id is None else theirs.bos_token_id)
    assert tokenizer.stop_tokens == {tokenizer.eos_id}
    assert tokenizer.named_tokens == theirs.special_tokens_map
    assert all(theirs.convert_tokens_to_ids(name) == token for name, token in tokenizer.special_tokens.items())
    assert set(theirs.all_special_tokens) <= tokenizer.special_tokens.keys()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [421, 422]}, {"eos_token_id": 420}, {421, 422}),
        ({"eos_token_id": 421}, None, {421}),
        ({"eos_token_id": None}, {"eos_token_id": [420]}, {420}),
        ({"eos_token_id": []}, {"eos_token_id": 420}, {420}),
        (None, {"eos_token_id": 420}, {420}),
        (None, {}, {422}),
    ],
)
def test_stop_tokens(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    files = {"generation_config": generation, "config": config}
    path = save(tmp_path, qwen(), IM, **{name: value for name, value in files.items() if value is not None})
    tokenizer = HFTokenizer(path)
    assert tokenizer.special_tokens["<|im_end|>"] == tokenizer.eos_id == 422
    assert tokenizer.stop_tokens == expected


def test_without_names_the_files_tell_the_ends(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save(tmp_path, llama3(), generation_config={"eos_token_id": [425, 421]}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.special_tokens["<|begin_of_text|>"], 425)


BAD_SIBLINGS: list[tuple[str, Any, str]] = [
    ("generation_config", {"eos_token_id": "2"}, r"generation_config.json: eos_token_id is str '2'"),
    ("generation_config", {"eos_token_id": True}, "generation_config.json: eos_token_id is bool"),
    ("generation_config", {"eos_token_id": [1, 2.0]}, "eos_token_id is list"),
    ("generation_config", {"eos_token_id": [1, 10**9]}, r"eos_token_id .* expected ids in 0..\d+"),
    ("config", {"eos_token_id": -1}, r"/config.json: eos_token_id"),
    ("config", [1], "/config.json: expected a JSON object"),
    ("generation_config", "<html>", "generation_config.json is not JSON"),
    ("tokenizer_config", "{", "tokenizer_config.json is not JSON"),
    ("tokenizer_config", "[" * 100_000, "tokenizer_config.json is not JSON"),
    ("tokenizer_config", {"eos_token": 2}, "tokenizer_config.json: eos_token is int 2"),
    ("tokenizer_config", {"bos_token": {"text": "<s>"}}, "tokenizer_config.json: bos_token is dict"),
    ("tokenizer_config", {"eos_token": "</s>"}, "tokenizer_config.json: eos_token is '</s>', no control token"),
    ("tokenizer_config", {"chat_template": 1}, "tokenizer_config.json: chat_template is int"),
    ("tokenizer_config", {"chat_template": [1]}, "tokenizer_config.json: chat_template is list"),
    ("tokenizer_config", {"chat_template": [{"name": "default", "template": 1}]}, "chat_template is list"),
    ("tokenizer_config", {"chat_template": [{"name": [], "template": ""}]}, "chat_template is list"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_SIBLINGS)
def test_bad_files_beside_are_told(tmp_path: Path, name: str, content: Any, says: str) -> None:
    path = save(tmp_path, qwen(), **{name: content})
    with pytest.raises(LlamaError, match=says) as refusal:
        HFTokenizer(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 300


def damaged(**changes: Any) -> str:
    return json.dumps(json.loads(qwen().to_str()) | changes)


def in_part(part: str, **changes: Any) -> str:
    stated = json.loads(qwen().to_str())
    return json.dumps(stated | {part: stated[part] | changes})


A = {"id": 420, "content": "<a>", "special": True, "normalized": False}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
BAD_FILES: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "empty"),
    "HTML": (lambda: "<!DOCTYPE html>", "HTML"),
    "LFS": (lambda: "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2183982\n", "git lfs pull"),
    "truncated": (lambda: damaged()[:-100], "is not JSON"),
    "a list": (lambda: "[]", "expected a JSON object"),
    "another object": (lambda: '{"vocab_size": 3}', r"without a 'model', only \['vocab_size'\]"),
    "a vocabulary": (lambda: '{"model": 3}', "without a 'model'"),
    "no vocabulary": (lambda: '{"model": {}}', "no tokenizer could be made"),
    "vocabulary of numbers": (lambda: in_part("model", vocab=3), "no tokenizer could be made"),
    "vocabulary of texts": (lambda: in_part("model", vocab={"a": "b"}), "no tokenizer could be made"),
    "negative id": (lambda: in_part("model", vocab={"a": -1}), "no tokenizer could be made"),
    "empty vocabulary": (
        lambda: damaged(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
        "vocabulary is empty",
    ),
    "merges of numbers": (lambda: in_part("model", merges=[1, 2]), "no tokenizer could be made"),
    "merges of nothing": (lambda: in_part("model", merges=[["zz", "qq"]]), "no tokenizer could be made"),
    "unknown token": (lambda: in_part("model", unk_token=[1]), "no tokenizer could be made"),
    "unknown model": (lambda: in_part("model", type="GPT"), "no tokenizer could be made"),
    "added tokens": (lambda: damaged(added_tokens={"a": 1}), "'added_tokens' is dict"),
    "an added token": (lambda: damaged(added_tokens=["a"]), "'added_tokens' has str 'a'"),
    "no flags": (lambda: damaged(added_tokens=[A]), "no tokenizer could be made"),
    "an empty name": (lambda: damaged(added_tokens=[A | FLAGS | {"content": ""}]), "'added_tokens' has dict"),
    "another id": (lambda: damaged(added_tokens=[A | FLAGS | {"id": 999}]), "'<a>' the id 999, .* has 420"),
    "the id of a word": (
        lambda: damaged(
            model={"type": "BPE", "vocab": {"a": 0, "<a>": 0}, "merges": []}, added_tokens=[A | FLAGS | {"id": 0}]
        ),
        "'a' has the id 0 of the control token '<a>'",
    ),
    "no decoder": (lambda: damaged(decoder=None), "'decoder' has the step None"),
    "another decoder": (
        lambda: damaged(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "'decoder' has the step .*WordPiece",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, says = BAD_FILES[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(make())
    for read in (HFTokenizer, open_tokenizer):
        with pytest.raises(LlamaError, match=says) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 400


def test_what_the_library_refuses_at_a_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}, added_tokens=[]))
    with pytest.raises(LlamaError, match="can't encode the text"):
        HFTokenizer(path).encode("b", bos=False, eos=False)


def test_the_content_says_which_tokenizer_it_is(tmp_path: Path) -> None:
    saved = save(tmp_path, qwen())
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\xef\xbb\xbf\n " + saved.read_bytes())
    assert type(open_tokenizer(path)) is HFTokenizer
    assert type(open_tokenizer(write(path, lines_of(TOKENS)))) is Tokenizer
    path.rename(tmp_path / "tokenizer.json")
    with pytest.raises(LlamaError, match="is not JSON"):
        open_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(LlamaError, match="directory"):
        open_tokenizer(tmp_path)
    with pytest.raises(LlamaError, match="no such file"):
        open_tokenizer(tmp_path / "absent.model")
    with pytest.raises(LlamaError, match=r"absent\.json"):
        HFTokenizer(tmp_path / "absent.json")


def test_a_sentencepiece_file_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    pieces = [b"\n\x05<unk>\x15\0\0\0\0\x18\x02", b"\n\x03<s>\x15\0\0\0\0\x18\x03", b"\n\x01a\x15\0\0\x80\xbf"]
    path.write_bytes(b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces))
    with pytest.raises(LlamaError, match=r"SentencePiece .* tokenizer\.json of the same model") as refusal:
        open_tokenizer(path)
    assert str(path) in str(refusal.value)
