"""Vocabulary files: which are read, from where, and which are refused, with a message of one line."""

import ast
import base64
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vocabulary import BASE, TOKENS, lines_of, write

import llama.tokenizer as tokenizer_module
from llama._util import special_names, vocabulary_file
from llama.errors import LlamaError
from llama.tokenizer import Tokenizer


def changed(index: int, line: bytes) -> bytes:
    lines = lines_of(TOKENS)
    lines[index] = line
    return b"\n".join(lines) + b"\n"


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n", "empty"),
    "HTML": (b"\n<!DOCTYPE html>\n<html></html>\n", "web page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2183982\n", "git lfs pull"),
    "JSON": (b'{\n  "version": "1.0"\n}\n', "line 1: found b'{'"),
    "binary": (b"\n\x0e\n\x05<unk>\x15\0\0\0\0", "line 2: found"),
    "no rank": (changed(4, b"+w=="), "line 5: .*1 field"),
    "three fields": (changed(4, b"+w== 4 4"), "line 5: .*3 field"),
    "bad base64": (changed(4, b"+*w== 4"), r"line 5: found b'\+\*w=='"),
    "bad padding": (changed(4, b"+w 4"), r"line 5: found b'\+w'"),
    "rank no number": (changed(4, b"+w== four"), "line 5: .*b'four'"),
    "negative rank": (changed(4, b"+w== -4"), "line 5: .*b'-4'"),
    "endless rank": (changed(4, b"+w== " + b"4" * 10_000), "line 5: .*b'444"),
    "duplicate rank": (changed(4, b"+w== 2"), "line 5: the rank 2 already has line 3"),
    "duplicate token": (changed(4, b"/w== 4"), r"line 5: the token b'\\xff' already has line 1"),
    "gap": (changed(BASE - 1, lines_of(TOKENS)[-1].split()[0] + b" %d" % BASE), f"no rank {BASE - 1}"),
    "starts at 1": (b"".join(b"%s %d\n" % (base64.b64encode(t), i + 1) for i, t in enumerate(TOKENS)), "no rank 0"),
    "a byte missing": (changed(255 - 0x41, base64.b64encode(b"AAA") + b" %d" % (255 - 0x41)), "1 of the 256 .* 0x41"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, says = BAD_FILES[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(LlamaError, match=says) as refusal:
        Tokenizer(str(path))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("make_path", "says"),
    [
        (lambda folder: str(folder / "absent.model"), "no such file"),
        (lambda folder: str(folder), "directory"),
        (lambda folder: "ftp://example.com/tokenizer.model", "can't be read"),
        (lambda folder: "nul\0byte", "can't be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, make_path: Callable[[Path], str], says: str) -> None:
    path = make_path(tmp_path)
    with pytest.raises(LlamaError, match=says) as refusal:
        Tokenizer(path)
    assert path in str(refusal.value)


def test_the_order_of_lines_and_the_line_ends_do_not_matter(tmp_path: Path, small: Tokenizer) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\r\n".join(reversed(lines_of(TOKENS))))
    text = "the thing 😀中"
    assert Tokenizer(path).encode(text, bos=True, eos=True) == small.encode(text, bos=True, eos=True)


def test_a_file_replaced_at_the_same_path_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    before = Tokenizer(write(path, lines_of(TOKENS)))
    after = Tokenizer(write(path, lines_of(TOKENS[:256])))
    assert before.encode("the", bos=False, eos=False) == [TOKENS.index(b"the")]
    assert after.encode("the", bos=False, eos=False) == [255 - byte for byte in b"the"]
    assert (before.n_words, after.n_words) == (BASE + 256, 512)


def test_the_vocabulary_is_read_through_blobfile(monkeypatch: pytest.MonkeyPatch) -> None:
    import blobfile

    url = "gs://bucket/tokenizer.model"
    monkeypatch.setattr(blobfile, "read_bytes", {url: b"\n".join(lines_of(TOKENS))}.__getitem__)
    assert Tokenizer(url).n_words == BASE + 256


def test_the_tokenizer_knows_no_tensors_and_no_other_room() -> None:
    """blobfile too isn't imported: it is imported where it is used, to start faster."""
    imported: set[str] = set()
    for module in (tokenizer_module, vocabulary_file, special_names):
        tree = ast.parse(Path(module.__file__).read_text())
        imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        origins = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        imported |= {"." * node.level + (node.module or "") for node in origins}
    assert imported - sys.stdlib_module_names == {
        "tiktoken",
        ".errors",
        "..errors",
        ".files",
        "._util.special_names",
        "._util.validate",
        "._util.vocabulary_file",
        "collections.abc",
    }
