"""What a newcomer meets first: a Python without the packages, names that are nearly right, warnings."""

import os
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path

import pytest
from published_tokenizers import IM, qwen, save

import llama as package
from llama import Llama, LlamaError
from llama.adapters.opening import find_base
from llama.checkpoints.demo import demo_checkpoint
from llama.cli.batch import check_extra_key
from llama.cli.program import errors_in_one_line
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.template_format import TemplateFormat

ROOT = Path(package.__file__).parents[1]
DIALOG = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(demo_checkpoint(), max_seq_len=64, max_batch_size=1, dtype="float32")


@pytest.mark.parametrize("words", [["-m", "llama", "chat"], ["example_chat_completion.py"]])
def test_a_python_without_the_packages_is_named_in_one_line(words: list[str]) -> None:
    command = [sys.executable, "-S", *words]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {sys.executable} has no ") and done.stderr.count("\n") == 1
    assert "activate" in done.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("top_logprob", "top_logprobs"),
        ("tool", "tools"),
        ("document", "documents"),
        ("chat_template_kwarg", "chat_template_kwargs"),
        ("date_strng", "date_string"),  # a variable of templates
    ],
)
def test_an_option_of_a_chat_that_is_misspelt_gets_a_suggestion(demo: Llama, name: str, meant: str) -> None:
    with pytest.raises(LlamaError, match=rf"^'{name}' is no setting: known are .*; did you mean {meant}\?$") as told:
        demo.chat_completion([DIALOG], **{name: None})
    assert "chat_template_kwargs, " in str(told.value) and "tools, " in str(told.value)


def test_a_setting_of_a_text_or_a_row_that_is_misspelt_gets_a_suggestion(demo: Llama) -> None:
    with pytest.raises(LlamaError, match=r"did you mean num_beams\?$"):
        demo.text_completion(["a"], num_beam=2)
    with pytest.raises(LlamaError, match=r"^rows\[0\]: 'top_kk' is no setting: .* did you mean top_k\?$"):
        demo.text_completion(["a"], rows=[{"top_kk": 2}])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("tool", "tools"), ("Document", "documents"), ("chat_template_kwarg", "chat_template_kwargs"), ("top-kk", None)],
)
def test_a_key_of_a_line_that_is_nearly_an_option_of_a_dialog_is_refused(key: str, meant: str | None) -> None:
    expected = f"is no option of a dialog: known are .* did you mean {meant}" if meant else "did you mean top_k"
    with pytest.raises(LlamaError, match=expected):
        check_extra_key(key)
    check_extra_key("source")


def test_an_adapter_that_is_not_there_is_named_as_the_adapter(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    expected = f"^adapter_dir {nowhere}: found nothing there, expected an adapter's directory, with adapter_config.json"
    with pytest.raises(LlamaError, match=expected):
        find_base(nowhere, nowhere)  # as commands call it without a ckpt_dir
    with pytest.raises(LlamaError, match=expected):
        Llama.build(demo_checkpoint(), adapter_dir=nowhere)
    with pytest.raises(LlamaError, match=r"^adapter_dir a/lora: .* run `hf download a/lora --local-dir lora`"):
        find_base("a/lora", "a/lora")


def test_the_demo_model_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlamaError) as told:
        Llama.build("demo/model")
    assert str(told.value).endswith(f"; the demo model is in {demo_checkpoint()}: give that")


def test_a_warning_is_one_line_in_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with errors_in_one_line():
            warnings.warn("the template doesn't use tools", stacklevel=1)
        assert warnings.showwarning is before
    assert capsys.readouterr().err == "warning: the template doesn't use tools\n"


def test_a_variable_that_a_template_lacks_has_no_effect(tmp_path: Path) -> None:
    path = save(tmp_path, qwen(), {**IM, "chat_template": "{{ messages[0].content }}"})
    made = TemplateFormat(HFTokenizer(path), datetime.now())
    with pytest.warns(UserWarning, match="doesn't use thinkng: it has no effect$"):
        made.encode_dialog_prompt(DIALOG, chat_template_kwargs={"thinkng": True})
    with pytest.warns(UserWarning, match="doesn't use documents: what they say is lost$"):
        made.encode_dialog_prompt(DIALOG, documents=[{"text": "a"}])


def test_ctrl_c_at_a_terminal_ends_below_what_was_typed() -> None:
    master, slave = os.openpty()
    program = "from llama._util.interrupt import end; end()"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=slave).returncode == 130
    assert os.read(master, 100) == b"\r\ninterrupted\r\n"
    os.close(slave)
    os.close(master)


def test_too_few_processes_are_counted_plainly() -> None:
    expected = "^model_parallel_size is 3 and the number of processes 1, expected a multiple of it; start with torchrun"
    with pytest.raises(LlamaError, match=expected):
        Llama.build(demo_checkpoint(), model_parallel_size=3)
