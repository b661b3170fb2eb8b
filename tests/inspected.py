"""What the tests of `python -m llama inspect` share: good directories in each layout, and the command's output."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import split_checkpoint, write_checkpoint

from llama.checkpoints.inspect import report_on
from llama.checkpoints.loader import survey
from llama.checkpoints.report import CheckpointReport
from llama.cli.commands import parse

SHARD, SECOND = "consolidated.00.pth", "consolidated.01.pth"


def write_hf_tokenizer(directory: Path) -> None:
    """The 256 bytes and two control tokens, as a tokenizer.json with its settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_hf(directory: Path, max_shard_size: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size=max_shard_size)
    write_hf_tokenizer(directory)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "meta": write_checkpoint,
    "meta of 4": lambda directory: split_checkpoint(write_checkpoint(directory.parent / "whole"), directory, 4),
    "hf": lambda directory: write_hf(directory, "1GB"),
    "hf indexed": lambda directory: write_hf(directory, "100KB"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: make(tmp_path_factory.mktemp("made") / "ckpt") for layout, make in MAKERS.items()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a good directory of that layout, for a test to break."""

    def of(layout: str) -> Path:
        target = tmp_path / "ckpt"
        target.mkdir()
        for path in originals[layout].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return of


def inspect(*arguments: object) -> tuple[int, str]:
    """(exit status, standard output) of the command, in this process."""
    stdout = io.StringIO()
    with mock.patch.object(sys, "argv", ["llama", "inspect", *map(str, arguments)]), contextlib.redirect_stdout(stdout):
        options = parse()
        try:
            options.run(options)
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code, stdout.getvalue()
    return 0, stdout.getvalue()


def report_of(directory: Path) -> CheckpointReport:
    return report_on(survey(directory))


def change_json(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))
