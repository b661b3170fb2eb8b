"""Llama 3.1 and later have three control tokens more than Llama 3, in the same tokenizer.model: the sizes tell them.

The names and ids are those of the published tokenizer.json of Llama 3 and of Llama 3.1.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ARGS, write_checkpoint

from llama import Llama, ModelArgs
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import inspect
from llama.rotary import RopeScaling
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.versions import is_llama_3_1
from llama.tokenizer import Tokenizer

SCALED = replace(ARGS, rope_scaling=RopeScaling("llama3", 8))
COMMON = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
COMMON |= {2: "<|reserved_special_token_0|>", 3: "<|reserved_special_token_1|>", 9: "<|eot_id|>"}
LLAMA_3 = COMMON | {4: "<|reserved_special_token_2|>", 5: "<|reserved_special_token_3|>"}
LLAMA_3 |= {
    8: "<|reserved_special_token_4|>",
    10: "<|reserved_special_token_5|>",
    255: "<|reserved_special_token_250|>",
}
LLAMA_3_1 = COMMON | {4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>", 8: "<|eom_id|>"}
LLAMA_3_1 |= {10: "<|python_tag|>", 11: "<|reserved_special_token_3|>", 255: "<|reserved_special_token_247|>"}


def names_of(special_tokens: dict[str, int]) -> dict[int, str]:
    first = special_tokens["<|begin_of_text|>"]
    return {token - first: name for name, token in special_tokens.items()}


def stops_of(tokenizer: Tokenizer | HFTokenizer) -> list[int]:
    return sorted(token - tokenizer.bos_id for token in tokenizer.stop_tokens)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama 3"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama 3.1"), SCALED)


def test_use_scaled_rope_gives_a_tokenizer_the_names_of_llama_3_1(old: Path, new: Path) -> None:
    assert json.loads((new / "params.json").read_text())["use_scaled_rope"] is True
    for directory, names, stops in (old, LLAMA_3, [1, 9]), (new, LLAMA_3_1, [1, 8, 9]):
        tokenizer = Llama.build(directory, device="cpu", max_seq_len=16).tokenizer
        assert isinstance(tokenizer, Tokenizer) and tokenizer.is_llama_3_1 == (directory == new)
        assert len(names_of(tokenizer.special_tokens)) == 256
        assert names_of(tokenizer.special_tokens).items() >= names.items()
        assert stops_of(tokenizer) == stops
        assert tokenizer.encode("<|eom_id|>", bos=False, eos=False, allowed_special="all") == (
            [tokenizer.bos_id + 8] if directory == new else list(b"<|eom_id|>")
        )


def test_a_file_without_a_model_is_llama_3s(old: Path) -> None:
    assert not Tokenizer(old / "tokenizer.model").is_llama_3_1
    assert Tokenizer(old / "tokenizer.model", is_llama_3_1=True).is_llama_3_1


def test_convert_writes_what_the_version_has(old: Path, new: Path, tmp_path: Path) -> None:
    for directory, names, stops in (old, LLAMA_3, [1, 9]), (new, LLAMA_3_1, [1, 8, 9]):
        converted = tmp_path / directory.name
        convert(directory, converted, "hf")
        written = HFTokenizer(converted / "tokenizer.json")
        assert names_of(written.special_tokens).items() >= names.items()
        assert stops_of(written) == stops
        settings = json.loads((converted / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [written.bos_id + stop for stop in stops]
        # Without its tokenizer.json, the sizes in config.json tell the same.
        (converted / "tokenizer.json").unlink()
        tokenizer = Llama.build(converted, device="cpu", max_seq_len=16).tokenizer
        assert isinstance(tokenizer, Tokenizer) and stops_of(tokenizer) == stops


def test_inspect_lists_the_stops_of_the_version(new: Path) -> None:
    report = inspect(new)
    assert report.tokenizer is not None
    assert [stop["name"] for stop in report.tokenizer.stop_tokens] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (ModelArgs(dim=4096, n_layers=32), False),  # 8B
        (ModelArgs(dim=8192, n_layers=80), False),  # 70B
        (ModelArgs(dim=4096, n_layers=32, rope_scaling=RopeScaling("llama3", 8)), True),  # 8B of 3.1
        (ModelArgs(dim=16384, n_layers=126), True),
        (ModelArgs(dim=2048, n_layers=16), True),
        (ModelArgs(dim=3072, n_layers=28), True),
        (ModelArgs(dim=2048, n_layers=22), False),
        (ModelArgs(rope_scaling=RopeScaling("linear", 8)), False),
    ],
)
def test_the_sizes_tell_the_version(args: ModelArgs, expected: bool) -> None:
    assert is_llama_3_1(args) is expected
