"""Scores and embeddings of texts against those of transformers, which gets one text or one window at a time."""

import dataclasses
import math
import os
import re
import select
import subprocess
import termios
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import assert_close, make_twin
from rank_pool import RankPool
from scoring_program import compute
from tiny import PROMPTS, ROOT, environment, launched, write_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from llama import Llama, LlamaError, ModelArgs
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.meta import save_checkpoint
from llama.engine.model_runner import LOGPROB_CHUNK
from llama.engine.scoring import Score, ScoringWindow, split_windows
from llama.parallel import Place
from llama.tokenization.hf_tokenizer import open_tokenizer

ARGS = ModelArgs(64, 2, 4, 2, 512, 32)
SIZE = 48
TEXTS = [*PROMPTS, "b", "the same length", "another length.", "x" * (SIZE - 1), "of many words, " * 3]
LONG = ["To be read in windows. " * 9, "y" * SIZE, "z" * (2 * SIZE), "é漢字🙂" * 12]
FORMS = ("plain", "fast")


@dataclass(frozen=True)
class World:
    theirs: LlamaForCausalLM
    directory: Path
    build: Callable[..., Llama]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, place: Place) -> World:
    directory, twin = tmp_path_factory.mktemp("scoring"), make_twin(ARGS)
    save_checkpoint(directory, ARGS, twin.ours.state_dict())
    write_tokenizer(directory / "tokenizer.model")

    @cache
    def build(form: str = "fast", max_batch_size: int = 3, max_seq_len: int = SIZE, **options: object) -> Llama:
        sizes = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
        if form == "fast":
            return Llama.build(directory, device="cpu", **{"dtype": "float32", **sizes, **options})  # type: ignore
        checkpoint = open_checkpoint(directory)
        model = load_model(checkpoint, replace(checkpoint.sizes, **sizes), place)
        return Llama(model, open_tokenizer(directory / "tokenizer.model"), **options)  # type: ignore

    return World(twin.theirs, directory, build)


@pytest.fixture(params=FORMS)
def llama(request: pytest.FixtureRequest, world: World) -> Llama:
    return world.build(request.param)


def ids(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=True, eos=False)


def assert_same(actual: list[float], expected: list[float], tolerance: float = 1e-5) -> None:
    assert actual == pytest.approx(expected, abs=tolerance)


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, tokens: list[int], size: int, stride: int) -> tuple[list[float], float]:
    """Logprobs and perplexity as in transformers' guide to perplexity, one window at a time."""
    chances, scored, losses, counted = [0.0], 0, 0.0, 0
    for start in range(0, len(tokens), stride):
        end = min(start + size, len(tokens))
        inputs = torch.tensor([tokens[start:end]])
        labels = inputs.clone()
        labels[:, : scored - end] = -100
        answer = model(input_ids=inputs, labels=labels, use_cache=False)
        number = int((labels[:, 1:] != -100).sum())
        losses, counted = losses + float(answer.loss) * number, counted + number
        logprobs = answer.logits[0, :-1].log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0]
        chances += logprobs[len(logprobs) - number :].tolist()
        scored = end
        if end == len(tokens):
            break
    return chances, math.exp(losses / counted)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_transformers(llama: Llama, world: World) -> None:
    """More texts than fit one batch, of different lengths, come back in the caller's order."""
    scores = llama.score(TEXTS)
    assert [one.tokens for one in scores] == [ids(llama, text) for text in TEXTS]
    for one in scores:
        with torch.no_grad():
            logits = world.theirs(input_ids=torch.tensor([one.tokens]), use_cache=False).logits[0]
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(one.tokens[1:])[:, None])[:, 0]
        assert_same(one.logprobs, [0.0, *expected.tolist()], 2e-5)
        assert one.logprob == pytest.approx(float(expected.sum()), abs=1e-4)
        assert one.perplexity == pytest.approx(math.exp(-float(expected.mean())), rel=1e-4)


@pytest.mark.parametrize("stride", [None, 1, 7, SIZE // 2, SIZE - 1])
def test_long_texts_are_read_in_windows(llama: Llama, world: World, stride: int | None) -> None:
    scores = llama.score([*LONG, *TEXTS[:2]], stride=stride)
    assert max(len(one.tokens) for one in scores) > 4 * SIZE
    for one in scores:
        chances, perplexity = by_hand(world.theirs, one.tokens, SIZE, stride or SIZE // 2)
        assert_same(one.logprobs, chances, 2e-5)
        assert one.perplexity == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("others", [{"max_batch_size": 1}, {"max_batch_size": 20}, {"prefill_chunk": 10}])
def test_the_batch_changes_nothing(world: World, form: str, others: dict[str, int]) -> None:
    texts = [*TEXTS, *LONG]
    scores, expected = world.build(form, **others).score(texts), world.build(form).score(texts)
    for one, other in zip(scores, expected, strict=True):
        assert_same(one.logprobs, other.logprobs)


def test_alone_as_together(llama: Llama) -> None:
    for text, expected in zip([*TEXTS, *LONG], llama.score([*TEXTS, *LONG]), strict=True):
        (score,) = llama.score([text])
        assert_same(score.logprobs, expected.logprobs)


def test_echoed_logprobs_are_scores(llama: Llama) -> None:
    tokens = [ids(llama, text) for text in PROMPTS[:3]]
    _, chances = llama.generate(tokens, 1, 0, logprobs=True, echo=True)
    for one, known in zip(llama.score(PROMPTS[:3]), chances, strict=True):
        assert_same(one.logprobs, known[: len(one.tokens)])


@pytest.mark.parametrize("size", [2, 3, 10])
def test_windows(size: int) -> None:
    """Each token but the first is scored once, and each window begins `stride` after the one before."""
    for stride in range(1, size):
        for length in range(1, 4 * size):
            windows = list(split_windows(7, length, size, stride))
            assert [place for w in windows for place in range(w.first, w.end)] == list(range(1, length))
            assert [w.start for w in windows] == list(range(0, stride * len(windows), stride))
            assert all(w.start < w.first < w.end <= w.start + size and w.text == 7 for w in windows)
    assert list(split_windows(0, 10, 6, 3)) == [
        ScoringWindow(0, 0, 6, 1),
        ScoringWindow(0, 3, 9, 6),
        ScoringWindow(0, 6, 10, 9),
    ]


def test_work_is_no_more_than_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are full, the longest texts first; logits are those of positions that are scored, in chunks."""
    llama = world.build("plain", 4, 700)
    passes, logits = [], []
    hidden_states, output = llama.model.hidden_states, llama.model.logits

    def watch(tokens: Tensor, *rest: object) -> Tensor:
        passes.append(tuple(tokens.shape))
        return hidden_states(tokens, *rest)

    monkeypatch.setattr(llama.model, "hidden_states", watch)
    monkeypatch.setattr(llama.model, "logits", lambda h: logits.append(len(h)) or output(h))
    llama.score(["a" * 9] * 5 + ["b" * 4] * 3 + ["c" * 1600], stride=600)
    read = 2 * 700 + 400 + 5 * 10 + 3 * 5
    assert sum(rows * length for rows, length in passes) <= read + 32 * len(passes)
    assert len(passes) <= 10
    assert max(logits) <= LOGPROB_CHUNK
    assert sum(logits) == 5 * 9 + 3 * 4 + 1600


def test_a_stream_under_way_goes_on(llama: Llama) -> None:
    (expected,) = llama.generate([ids(llama, "hello")], 20, 0)[0]
    for use in (llama.score, llama.embed):
        stream = llama.stream([ids(llama, "hello")], 20, 0)
        found = [step.token for step in next(stream)]
        use(PROMPTS[:2])
        assert found + [step.token for steps in stream for step in steps] == expected


def test_rounded_matrices(world: World) -> None:
    """Scores with quantized matrices are near those without."""
    llama = world.build(quantization="int8")
    for one, other in zip(llama.score(TEXTS), world.build().score(TEXTS), strict=True):
        assert_same(one.logprobs, other.logprobs, 2)
        assert one.logprob == pytest.approx(other.logprob, abs=0.2 * len(one.tokens))


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_transformers(llama: Llama, world: World) -> None:
    last, mean = (llama.embed(TEXTS, pooling) for pooling in ("last", "mean"))
    assert torch.equal(llama.embed(TEXTS), last)
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            expected = world.theirs.model(input_ids=torch.tensor([ids(llama, text)])).last_hidden_state[0]
        assert_close(last[i], expected[-1], 1e-5)
        assert_close(mean[i], expected.mean(0), 1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_any_batch(llama: Llama, world: World, pooling: str) -> None:
    expected = llama.embed(TEXTS, pooling)
    for i, text in enumerate(TEXTS):
        assert_close(llama.embed([text], pooling)[0], expected[i], 1e-5)
    assert_close(world.build(prefill_chunk=10).embed(TEXTS, pooling), expected, 1e-5)


def test_embeddings_are_float32_in_any_dtype(world: World) -> None:
    llama = world.build(dtype="bfloat16")
    assert_close(llama.embed(TEXTS, "mean"), world.build().embed(TEXTS, "mean"), 0.05)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_texts(llama: Llama) -> None:
    assert llama.score([]) == []
    assert llama.embed([]).shape == (0, ARGS.dim)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("text", "texts is 'text', expected a list of strings, or of dialogs"),
        (["a", 3], "texts is ['a', 3], expected a list of strings, or of dialogs"),
        (["a", ""], "text 1 is empty: give it at least one character"),
    ],
)
def test_bad_texts_are_refused(world: World, monkeypatch: pytest.MonkeyPatch, texts: object, message: str) -> None:
    llama = world.build()
    monkeypatch.setattr(llama.model, "run", None)
    for use in (llama.score, llama.embed):
        with pytest.raises(LlamaError, match=re.escape(message)):
            use(texts)


@pytest.mark.parametrize("stride", [0, -1, SIZE, SIZE + 1, 1.5, "2", True])
def test_bad_strides_are_refused(world: World, monkeypatch: pytest.MonkeyPatch, stride: object) -> None:
    monkeypatch.setattr(world.build().model, "run", None)
    with pytest.raises(LlamaError, match=re.escape(f"stride is {stride!r}, expected a whole number in [1, {SIZE})")):
        world.build().score(["a"], stride=stride)


def test_other_refusals(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = world.build()
    monkeypatch.setattr(llama.model, "run", None)
    with pytest.raises(LlamaError, match="pooling is 'max', expected 'last' or 'mean'"):
        llama.embed(["a"], "max")
    with pytest.raises(LlamaError, match=f"text 1 has {SIZE + 1} tokens, but max_seq_len is {SIZE}: shorten it"):
        llama.embed(["a", "x" * SIZE])
    monkeypatch.setattr(llama.tokenizer, "encode", lambda text, **_: [])
    with pytest.raises(LlamaError, match="text 0, 'a', has no token"):
        llama.score(["a"])
    with pytest.raises(LlamaError, match="max_seq_len is 1, within which no token follows another"):
        world.build(max_seq_len=1).score(["a"])


def test_numbers_that_are_none_are_refused(world: World) -> None:
    llama = world.build("plain", 2, 20)
    weight = llama.model.layers[0].ffn_norm.weight
    weight.data.fill_(torch.nan)
    for use, what in ((llama.score, "logprobs"), (llama.embed, "hidden states")):
        with pytest.raises(LlamaError, match=rf"text 0: the {what} are not finite in torch.float32"):
            use(["a", "bc"])


def test_a_score() -> None:
    one = Score([1, 2, 3], [0.0, -1.0, -3.0])
    assert (one.logprob, one.perplexity) == (-4.0, pytest.approx(math.exp(2)))
    assert math.isnan(Score([1], [0.0]).perplexity), "nothing was predicted"
    assert Score([1, 2], [0.0, -1000.0]).perplexity == math.inf
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.tokens = []  # type: ignore[misc]


# --- ranks, and terminals --------------------------------------------------------------------------------------------


def test_two_ranks_are_one(pool: RankPool, world: World) -> None:
    results = []
    for ranks in (0, 2):
        done = pool.run(compute, str(world.directory), ranks=ranks)
        assert "scoring" not in done.stdout + done.stderr, "no bar in a pipe"
        results += done.results
    one, *two = results
    for other in two:
        for mine, theirs in zip(other["scores"], one["scores"], strict=True):
            assert mine["tokens"] == theirs["tokens"]
            assert_same(mine["logprobs"], theirs["logprobs"], 2e-5)
        for mine, theirs in zip(other["embeddings"], one["embeddings"], strict=True):
            assert_close(mine, theirs, 1e-5)
        assert other["refused"] == "rank 1: text 0 is empty: give it at least one character"
    assert two[0]["scores"] == two[1]["scores"]
    alone = world.build(max_seq_len=24)
    assert [asdict(mine)["tokens"] for mine in alone.score(PROMPTS)] == [theirs["tokens"] for theirs in one["scores"]]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_terminal_shows_a_bar_once(world: World, tmp_path: Path, ranks: int) -> None:
    program = tmp_path / "bar.py"
    program.write_text(
        "import sys\n"
        "from llama import Llama\n"
        "from llama._util import console\n"
        "llama = Llama.build(sys.argv[1], device='cpu', max_batch_size=1)\n"
        "console.SECONDS_BEFORE_BAR = 0\n"
        "llama.score(['a', 'bc', 'def'])\n"
        "llama.embed(['a', 'bc', 'def'])\n"
    )
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = launched(str(program), str(world.directory), ranks=ranks)
    subprocess.run(command, stderr=slave, env=environment(), cwd=ROOT, check=True, timeout=120)
    os.set_blocking(master, False)
    shown = b"".join(iter(lambda: os.read(master, 1 << 16) if select.select([master], [], [], 1)[0] else b"", b""))
    for doing in (b"scoring", b"embedding"):
        assert re.search(rb"%s: 100%%.* 9/9 .* tokens/s" % doing, shown), shown
    assert shown.count(b"\n") == 2, "one rank shows them"
