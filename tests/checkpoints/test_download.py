"""Checkpoints in object stores: copied to a cache once, each file whole; a stand-in takes the place of the network."""

import os
from pathlib import Path

import object_store
import pytest
from object_store import URL, Store

from llama import Llama, LlamaError
from llama._util.urls import is_url
from llama.checkpoints.download import cache_directory, copy_to_cache

store = object_store.store


def test_a_model_is_built_from_a_url_and_copied_once(store: Store, tmp_path: Path) -> None:
    texts = [
        Llama.build(source, device="cpu", dtype="float32", max_seq_len=64).text_completion(["hello"], 0, max_gen_len=8)
        for source in (URL, URL + "/", store.directory)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert store.read == {"consolidated.00.pth": 1, "params.json": 1, "tokenizer.model": 1}
    copies = list((tmp_path / "home" / ".cache" / "llama").iterdir())
    assert copies == [cache_directory(URL)]
    assert sorted(p.name for p in copies[0].iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]


def test_what_has_changed_is_copied_anew(store: Store, tmp_path: Path) -> None:
    copy_to_cache(URL, tmp_path / "cache")
    params = store.directory / "params.json"
    params.write_text(params.read_text() + " ")
    tokenizer = store.directory / "tokenizer.model"
    os.utime(tokenizer, (1e9, 1e9))
    target = copy_to_cache(URL, tmp_path / "cache")
    assert store.read == {"consolidated.00.pth": 1, "params.json": 2, "tokenizer.model": 2}
    assert (target / "params.json").read_text() == params.read_text()


def test_the_original_folder_comes_along(store: Store, tmp_path: Path) -> None:
    original = store.directory / "original"
    original.mkdir()
    (store.directory / "other").mkdir()
    for path in [p for p in store.directory.iterdir() if p.is_file()]:
        path.rename(original / path.name)
    target = copy_to_cache(URL, tmp_path / "cache")
    assert [p.name for p in target.iterdir()] == ["original"]
    Llama.build(target, device="cpu", dtype="float32")


def test_a_torn_download_leaves_no_file_and_is_told_in_one_line(store: Store, tmp_path: Path) -> None:
    store.broken = "consolidated.00.pth"
    with pytest.raises(LlamaError, match=r"gs://bucket/models/tiny can't be read \(connection reset\)"):
        Llama.build(URL, device="cpu")
    assert not list(cache_directory(URL).glob("consolidated*"))
    store.broken = None
    Llama.build(URL, device="cpu", dtype="float32")


def test_an_unknown_bucket(store: Store) -> None:
    with pytest.raises(LlamaError, match=r"gs://other can't be read \(no such bucket: gs://other\)"):
        Llama.build("gs://other", device="cpu")


def test_paths_are_no_urls() -> None:
    assert [is_url(p) for p in (URL, "az://a/b", "/a/b", "a:b", Path("/x"), None)] == [True, True] + [False] * 4
