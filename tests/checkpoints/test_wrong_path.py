"""What is given instead of a checkpoint's directory: each message names the next step."""

import os
import shutil
from pathlib import Path

import pytest
from tiny import ROOT, write_checkpoint

from llama import Llama, LlamaError, convert, inspect
from llama.checkpoints.convert import convert as convert_files
from llama.tokenization.hf_tokenizer import open_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: `models/tiny` holds a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_checkpoint(tmp_path / "models" / "tiny")
    return tmp_path


def refusal(ckpt_dir: object) -> str:
    with pytest.raises(LlamaError) as caught:
        Llama.build(ckpt_dir, device="cpu", dtype="float32")  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_a_name_on_the_hub(here: Path, name: str) -> None:
    command = f"`hf download {name} --local-dir {name.partition('/')[2]}`"
    for form in (name, f"hf://{name}", f"https://huggingface.co/{name}", f"https://hf.co/{name}/tree/main"):
        assert command in refusal(form)


def test_a_name_whose_files_are_in_the_hubs_cache(here: Path) -> None:
    snapshot = here / "home/.cache/huggingface/hub/models--meta-llama--Tiny/snapshots/abc"
    shutil.copytree(here / "models" / "tiny", snapshot)
    assert refusal("meta-llama/Tiny").endswith(f": give {snapshot}")


def test_other_urls(here: Path) -> None:
    for url in ("https://example.com/model", "s3://bucket/model", "hf://x"):
        assert f"'{url}' is no URL of a store that is read, which are gs://" in refusal(url)
    assert refusal("file:///models/tiny").endswith("write '/models/tiny'")
    for function in (inspect, lambda url: convert(url, "new", "hf")):
        with pytest.raises(LlamaError, match="hf download a/b --local-dir b"):
            function("https://huggingface.co/a/b")


@pytest.mark.parametrize("form", ["~/tiny", "$HOME/tiny", "${HOME}/tiny"])
def test_what_a_shell_has_not_replaced(here: Path, form: str) -> None:
    assert f"write {here}/home/tiny" in refusal(form)
    calls = {
        "a tokenizer": lambda: open_tokenizer(form),
        "what is read": lambda: convert_files(form, "new", "hf"),
        "what is written": lambda: convert_files("models/tiny", form, "hf"),
    }
    for what, call in calls.items():
        with pytest.raises(LlamaError) as caught:
            call()
        assert f"write {here}/home/tiny" in str(caught.value), what
    assert sorted(os.listdir(here)) == ["models"]


def test_a_directory_of_such_a_name_is_taken(here: Path) -> None:
    shutil.copytree(here / "models", here / "~")
    assert inspect("~/tiny").ok


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_a_file_of_the_checkpoint(here: Path, name: str) -> None:
    assert refusal(f"models/tiny/{name}").endswith("; give the directory that the file is in: models/tiny")


def test_files_of_no_checkpoint(here: Path) -> None:
    for name, step in {
        "a.gguf": "GGUF files aren't read: give the directory",
        "A.GGUF": "GGUF files aren't read",
        "model.tar.gz": "unpack the archive",
        "model.zip": "unpack the archive",
        "notes.txt": "give the directory of the checkpoint",
    }.items():
        (here / "x").mkdir(exist_ok=True)
        (here / "x" / name).touch()
        assert step in refusal(here / "x" / name)
    assert "found A.GGUF, a.gguf, model.tar.gz" in refusal("x")
    assert "GGUF files aren't read" in refusal("x")


def test_folders_too_high_and_too_deep(here: Path) -> None:
    assert refusal("models").endswith("; a folder in it holds a checkpoint: give models/tiny")
    assert refusal(here).endswith(f"; a folder in it holds a checkpoint: give {here}/models/tiny")
    shutil.copytree(here / "models" / "tiny", here / "models" / "tiny2")
    assert refusal("models").endswith("give models/tiny (and 1 more)")
    (here / "models/tiny/1_Pooling").mkdir()
    for path in ("models/tiny/1_Pooling", "models/tiny/missing"):
        assert refusal(path).endswith(f"; a folder above it holds a checkpoint: give {here}/models/tiny")
    (here / "empty").mkdir()
    assert refusal("empty").endswith("found an empty directory")


def test_a_name_that_is_misspelt(here: Path) -> None:
    assert refusal("models/tiny_").endswith("; did you mean models/tiny?")
    assert refusal("modles").endswith("; did you mean models?")
    assert refusal("elsewhere/x/y").endswith("expected a directory that holds a checkpoint")


def test_messages_name_the_argument_that_is_meant(here: Path) -> None:
    with pytest.raises(LlamaError, match=r"^draft_ckpt_dir nope: found nothing there"):
        Llama.build("models/tiny", draft_ckpt_dir="nope", device="cpu", dtype="float32")
    with pytest.raises(LlamaError, match=r"^draft_ckpt_dir is 5, expected the path"):
        Llama.build("models/tiny", draft_ckpt_dir=5, device="cpu", dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(LlamaError, match=r"^src nope: found nothing there"):
        convert("nope", "new", "hf")
    with pytest.raises(LlamaError, match=r"^directory nope: found nothing there"):
        inspect("nope")


def test_a_path_with_a_zero_byte(here: Path) -> None:
    assert refusal("a\0b") == r"ckpt_dir is 'a\x00b', expected the path of a checkpoint's directory"


def test_a_giant_path_is_shortened(here: Path) -> None:
    message = refusal("a" * 5000)
    assert len(message) < 200 and "can't be read (File name too long)" in message


def test_a_directory_for_the_tokenizers_file(here: Path) -> None:
    with pytest.raises(LlamaError, match=r"give the path of the tokenizer.model in it"):
        open_tokenizer(here / "models/tiny")
    (here / "hf").mkdir()
    (here / "hf/tokenizer.json").touch()
    with pytest.raises(LlamaError, match=r"give the path of the tokenizer.json in it"):
        open_tokenizer(here / "hf")
    with pytest.raises(LlamaError, match=r"hf download a/b --local-dir b"):
        open_tokenizer("https://huggingface.co/a/b/resolve/main/tokenizer.json")


def test_the_demo_is_no_exception() -> None:
    assert refusal(ROOT / "demo").endswith(f"give {ROOT}/demo/model")
