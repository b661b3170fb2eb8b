"""What the tests of `complete --input` share: a tiny random model whose vocabulary is the bytes, lines, and runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from json_lines import write
from tiny import ARGS, write_checkpoint

from llama import Llama
from llama.cli.batch import complete_file

SHARED: dict[str, Any] = {"temperature": 0.9, "max_gen_len": 12}
SEED = 7
MIXED = [
    {"prompt": "hello there", "id": "first"},
    {"prompt": "a", "temperature": 0, "meta": {"é": [1, None, "\ud800"]}},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "max_gen_len": 5},
    {"prompt": "the quick brown fox", "n": 3, "temperature": 1.5},
    {"prompt": "é漢字🙂", "logprobs": True, "seed": 5, "top_k": 3},
    {"prompt": "n and logprobs", "n": 2, "logprobs": True, "seed": 3, "stop": ["e"], "temperature": 2},
    {"prompt": "x" * 40, "logit_bias": {"101": 100}, "stop": "eee"},
    {"prompt": "again", "stop_token_ids": [97, 98], "repetition_penalty": 1.3, "max_gen_len": None},
    {"prompt": "again", "seed": None, "min_p": 0.1, "top_p": 0.5},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("jobs") / "ckpt", ARGS, endless=True)


@pytest.fixture(scope="module")
def built(directory: Path) -> Callable[[int], Llama]:
    made: dict[int, Llama] = {}

    def build(rows: int) -> Llama:
        if rows not in made:
            made[rows] = Llama.build(directory, max_seq_len=96, max_batch_size=rows, device="cpu", dtype="float32")
        return made[rows]

    return build


@pytest.fixture
def llama(built: Callable[[int], Llama]) -> Llama:
    return built(4)


def run(llama: Llama | None, source: Path, output: Path, force: bool = False, **shared: Any) -> str | None:
    """llama: None if no model may be built."""

    def build() -> Llama:
        assert llama is not None, "a model was built"
        return llama

    about = {"max_seq_len": 96}
    return complete_file(str(source), str(output), {**SHARED, **shared}, SEED, about, force, build)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def answered(llama: Llama, lines: list[Any], tmp_path: Path) -> list[dict]:
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    run(llama, write(tmp_path / "in.jsonl", lines), output)
    return records(output)


def heard(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The prompts that are given to the engine together, from here on."""
    batches: list[list[list[int]]] = []
    make_requests = llama.engine.make_requests

    def listening(prompts: list[list[int]], *rest: Any) -> Any:
        batches.append(prompts)
        return make_requests(prompts, *rest)

    monkeypatch.setattr(llama.engine, "make_requests", listening)
    return batches


def assert_same_records(output: Path, expected: bytes) -> None:
    """All keys and texts are the same, and logprobs but for rounding, which depends on what was computed together."""
    found, wanted = output.read_bytes().splitlines(), expected.splitlines()
    assert len(found) == len(wanted)
    for mine, theirs in zip(map(json.loads, found), map(json.loads, wanted), strict=True):
        assert list(mine) == list(theirs)
        for key in mine:
            if key == "logprobs":
                mine_list, their_list = (flatten(record[key]) for record in (mine, theirs))
                assert mine_list == pytest.approx(their_list, abs=1e-5)
            else:
                assert mine[key] == theirs[key]


def flatten(value: Any) -> list[float]:
    """The numbers of a list, or of a list of lists."""
    return [x for one in value for x in flatten(one)] if isinstance(value, list) else [value]
