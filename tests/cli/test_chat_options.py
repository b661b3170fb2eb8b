"""Tools and variables of a chat template in calls, lines of a file and chats; and a chat that answers nothing."""

import io
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from published_tokenizers import save
from tiny import ARGS, run_program, write_checkpoint
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from llama import Llama, LlamaError
from llama.cli.batch import RequestReader
from llama.cli.chat import talk
from llama.cli.conversation import read_dialog, read_dialog_options
from llama.tokenization.hf_tokenizer import HFTokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}A{% if enable_thinking is false %}!{% endif %}{% endif %}"
)
USER: Any = {"role": "user", "content": "Hi"}
TOOLS = [{"name": "now"}]


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("options") / "ckpt", ARGS, endless=True)


@pytest.fixture(scope="module")
def llama(meta: Path, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """A model with a template: its vocabulary is the bytes."""
    made = Llama.build(meta, max_seq_len=120, max_batch_size=1, device="cpu", dtype="float32")
    letters = pre_tokenizers.ByteLevel.alphabet()
    library = Library(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(letters))}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    path = save(tmp_path_factory.mktemp("tokenizer"), library, {"chat_template": TEMPLATE})
    return Llama(made.model, HFTokenizer(path))


def test_calls_take_what_is_asked_for_a_dialog(llama: Llama) -> None:
    greedy: Any = {"temperature": 0, "max_gen_len": 4}
    for options, end in (
        ({}, "user:Hi\nA"),
        ({"tools": TOOLS}, '[{"name": "now"}]user:Hi\nA'),
        ({"enable_thinking": False}, "user:Hi\nA!"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "user:Hi\nA!"),
        ({"add_generation_prompt": False}, "user:Hi\n"),
        ({"continue_final_message": True}, "user:Hi"),
    ):
        prompt = llama.tokenizer.encode(end, bos=False, eos=False)
        (expected,) = llama.complete([prompt], **greedy)
        (found,) = llama.chat_completion([[USER]], **greedy, **options)
        assert found["generation"]["content"] == expected.text
    with pytest.raises(LlamaError, match="temperatur"):
        llama.chat_completion([[USER]], temperatur=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("dialog", [5, 0, None, "Hi", 2.5, {"a": 1}.keys(), object()])
def test_what_is_no_dialog_is_named(llama: Llama, meta: Path, dialog: Any) -> None:
    for made in (llama, Llama.build(meta, device="cpu", dtype="float32", max_seq_len=16)):
        with pytest.raises(LlamaError, match="a dialog is"):
            made.chat_completion([[USER], dialog])
        with pytest.raises(LlamaError, match="a dialog is"):
            made.formatter.encode_dialog_prompt(dialog)


def test_lines_take_what_is_asked_for_a_dialog(llama: Llama) -> None:
    reader = RequestReader(llama, {}, 1, datetime(2026, 1, 1))

    def read(**line: Any) -> Any:
        return reader.read(1, json.dumps({"messages": [USER], "id": 7, **line}).encode())

    options: list[dict[str, Any]] = [{"tools": TOOLS}, {"chat_template_kwargs": {"enable_thinking": False}}]
    options += [{"enable_thinking": False}, {"add_generation_prompt": False}, {"continue_final_message": True}]
    for option in options:
        request = read(**option)
        assert request.prompt_tokens == llama.formatter.encode_dialog_prompt([USER], **option)
        assert request.extra == {"id": 7}
    with pytest.raises(LlamaError, match="tools goes with messages"):
        reader.read(1, json.dumps({"prompt": "a", "tools": []}).encode())
    with pytest.raises(LlamaError, match="tools is str"):
        read(tools="now")


def chat(llama: Llama, monkeypatch: pytest.MonkeyPatch, *lines: str, asked: Any = None) -> None:
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    talk(llama, None, {"temperature": 0, "max_gen_len": 4}, asked)


def test_a_chat_has_tools_and_variables(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    asked = read_dialog_options(str(tmp_path / "tools.json"), None, '{"enable_thinking": false}')
    chat(llama, monkeypatch, "Hi", asked=asked)
    prompt = llama.tokenizer.encode('[{"name": "now"}]user:Hi\nA!', bos=False, eos=False)
    (expected,) = llama.complete([prompt], temperature=0, max_gen_len=4)
    assert capsys.readouterr().out == expected.text + "\n"
    for bad in ("{", "[1]", '{"tools": []}'):
        with pytest.raises(LlamaError, match="chat_template_kwargs"):
            read_dialog_options(None, None, bad)
    with pytest.raises(LlamaError, match="absent"):
        read_dialog_options(str(tmp_path / "absent.json"), None, None)


def test_a_piped_chat_that_answered_nothing_fails(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        chat(llama, monkeypatch, "x" * 500)
    assert ended.value.code == 1
    chat(llama, monkeypatch, "x" * 500, "Hi")
    chat(llama, monkeypatch, "/help")
    chat(llama, monkeypatch)


def test_a_dialog_with_calls_can_be_loaded(tmp_path: Path) -> None:
    dialog = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}]
    dialog += [{"role": "tool", "content": "noon"}]
    (tmp_path / "dialog.json").write_text(json.dumps(dialog))
    assert read_dialog(str(tmp_path / "dialog.json")) == dialog


@pytest.mark.slow
def test_the_command_has_the_options(meta: Path) -> None:
    done = run_program("-m", "llama", "chat", "--ckpt_dir", str(meta), "--chat_template_kwargs", "{", input="hi\n")
    assert done.returncode == 1 and "--chat_template_kwargs is not JSON" in done.stderr
