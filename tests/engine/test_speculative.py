"""Proposed tokens: the text is the same as without them, greedy or sampled, in fewer passes."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from completion_program import complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from tiny import ARGS, ROOT, run_program, write_checkpoint

from llama import Llama, LlamaError
from llama.checkpoints.schema import memory_needed
from llama.engine.sequence import OutputOptions, Sequence
from llama.engine.sequence_maker import CallOptions
from llama.engine.speculative import lookup
from llama.session import Session

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 4, "device": "cpu", "dtype": "float32"}
few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS, endless=True)


@pytest.fixture(scope="module")
def llama(directory: Path) -> Llama:
    return Llama.build(directory, **OPTIONS)


@few
@given(tokens=st.lists(st.integers(0, 2), max_size=30), ngram=st.integers(1, 4), most=st.integers(0, 6))
def test_lookup(tokens: list[int], ngram: int, most: int) -> None:
    earlier = [i for i in range(len(tokens) - ngram) if tokens[i : i + ngram] == tokens[len(tokens) - ngram :]]
    last = max(earlier, default=None)
    assert lookup(tokens, ngram, most) == ([] if last is None else tokens[last + ngram : last + ngram + most])


@few
@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=90), min_size=1, max_size=4),
    ngram=st.integers(1, 3),
    most=st.integers(1, 8),
    given=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0, 0.05, 1.0]), "seed": st.integers(0, 3)},
        optional={
            "repetition_penalty": st.just(0.5),  # which makes it repeat itself
            "frequency_penalty": st.just(-2),
            "no_repeat_ngram_size": st.just(4),
            "stop": st.sampled_from(["a", "\n"]),
            "min_gen_len": st.just(3),
            "top_k": st.just(3),
            "max_gen_len": st.integers(3, 40),
        },
    ),
)
def test_the_text_is_the_same(llama: Llama, prompts: list, ngram: int, most: int, given: dict[str, Any]) -> None:
    plain = llama.complete(prompts, logprobs=True, top_logprobs=2, **given)
    completions = llama.complete(
        prompts, logprobs=True, top_logprobs=2, lookup_ngram=ngram, speculate_k=most, **given
    )  # fmt: skip
    for one, other in zip(completions, plain, strict=True):
        assert (one.tokens, one.text, one.finish_reason, one.stop) == (
            other.tokens,
            other.text,
            other.finish_reason,
            other.stop,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def oracle(answers: dict[int, list[int]], wrong_every: int) -> Any:
    """Proposes what the sequence will say, with a wrong token now and then."""

    def guess(row: Sequence, most: int) -> list[int]:
        start = len(row.answer)
        ahead = answers[row.index][start : start + most]
        return [(token + 1) % 256 if (start + i) % wrong_every == 0 else token for i, token in enumerate(ahead)]

    return lambda rows, mosts: [guess(row, most) for row, most in zip(rows, mosts, strict=True)]


@pytest.mark.parametrize("wrong_every", [1, 3, 1000])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_proposals_of_any_quality(llama: Llama, wrong_every: int, temperature: float) -> None:
    """Several steps of a sequence come after one pass; tokens that are proposed and accepted are counted."""
    prompts = [[5, 6, 7], [1] * 20, [9]]
    plain = llama.complete(prompts, 30, temperature, seed=2)
    shared = {"max_gen_len": 30, "temperature": temperature, "top_p": 0.9, "seed": 2}
    requests = llama.engine.make_requests(prompts, shared, None, CallOptions(OutputOptions()))
    answers = {i: one.tokens for i, one in enumerate(plain)}
    guess = oracle(answers, wrong_every)
    for request in requests:
        request.sequence.proposer, request.sequence.most_proposals = guess, 4
    passes = list(llama.engine.stream(requests))
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for steps in passes:
        for step in steps:
            streamed[step.row].append(step.token)
    assert streamed == answers
    if wrong_every == 1000:
        assert llama.acceptance > 0.9 and len(passes) <= 8
    if wrong_every == 1:
        assert llama.acceptance == 0 and len(passes) == 31, "two passes read the prompts"


def test_what_is_drawn_has_the_distribution(llama: Llama) -> None:
    """Chi-square over many seeds, of the second token after proposals of the likeliest: 0.999 of right ones pass."""
    prompt, counts, size = [[1, 2, 3]], torch.zeros(2, 512), 400
    for seed in range(size):
        for i, options in enumerate(({}, {"lookup_ngram": 1, "speculate_k": 3})):
            (one,) = llama.complete(prompt, 3, 1.0, 1.0, seed=seed + 10_000 * i, top_k=4, **options)
            counts[i, one.tokens[1]] += 1
    seen = counts.sum(0) >= 10
    ours, theirs = counts[:, seen]
    statistic = ((ours - theirs) ** 2 / (ours + theirs)).sum().item()
    freedom = int(seen.sum()) - 1
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


def test_a_text_that_repeats_itself_takes_fewer_passes(llama: Llama) -> None:
    shared = {"max_gen_len": 60, "temperature": 0, "frequency_penalty": -2}
    plain = list(llama.stream([[0, 1]], **shared))
    fewer = list(llama.stream([[0, 1]], lookup_ngram=2, **shared))
    assert [step.token for steps in fewer for step in steps] == [step.token for steps in plain for step in steps]
    assert len(fewer) < 0.8 * len(plain) and llama.acceptance > 0.5
    llama.complete([[0, 1]], 1, lookup_ngram=2)
    assert llama.acceptance is None, "nothing was proposed"
    list(llama.stream([[0, 1]], lookup_ngram=2, **shared))
    llama.complete([[0, 1]], 1)
    assert llama.acceptance is None, "the last call is a plain one"


def on_two_ranks(pool: RankPool, directory: Path, build: dict[str, Any], **options: Any) -> list[Any]:
    """(tokens, acceptance) that each rank says of an answer."""
    options = {"max_gen_len": 20, "temperature": 0.7, "seed": 1, **options}
    outcome = pool.run(complete, str(directory), OPTIONS | build, [[[1, 2, 1, 2], [3]]], options, ranks=2)
    return [([answer["tokens"] for answer in answers], acceptance) for answers, acceptance in outcome.results]


def test_on_two_ranks(pool: RankPool, directory: Path, llama: Llama) -> None:
    expected = llama.complete([[1, 2, 1, 2], [3]], 20, 0.7, seed=1, repetition_penalty=0.6)
    for tokens, _ in on_two_ranks(pool, directory, {}, lookup_ngram=1, repetition_penalty=0.6):
        assert tokens == [answer.tokens for answer in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lookup_ngram": 0}, "lookup_ngram is 0"), ({"lookup_ngram": 2, "speculate_k": 0}, "speculate_k is 0")],
)
def test_what_cannot_be_is_refused(llama: Llama, arguments: dict, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        llama.complete([[1]], 3, **arguments)
    with pytest.raises(LlamaError, match="lookup_ngram was given: drop one of them"):
        llama.complete([[1]], 3, 0, num_beams=2, lookup_ngram=2)


# --- a draft model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafted(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """The draft is the model with some noise, so that it often chooses the same, but not always."""
    target = tmp_path_factory.mktemp("draft")
    shutil.copytree(directory, target, dirs_exist_ok=True)
    tensors, chance = torch.load(target / "consolidated.00.pth"), torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        tensor += 0.03 * tensor.std() * torch.randn(tensor.shape, generator=chance) if tensor.ndim > 1 else 0
    torch.save(tensors, target / "consolidated.00.pth")
    return Llama.build(directory, **OPTIONS, draft_ckpt_dir=target)


@few
@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=92), min_size=1, max_size=4),
    most=st.integers(1, 7),
    given=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0, 0.7, 1.5]), "seed": st.integers(0, 3)},
        optional={
            "repetition_penalty": st.just(1.2),
            "stop": st.sampled_from(["a", "\n"]),
            "top_k": st.just(3),
            "max_gen_len": st.integers(3, 40),
        },
    ),
)
def test_a_drafted_text_is_the_same(
    llama: Llama, drafted: Llama, prompts: list, most: int, given: dict[str, Any]
) -> None:
    """With ragged prompts, sequences that end at different times, and full contexts."""
    plain = llama.complete(prompts, **given)
    completions = drafted.complete(prompts, speculate_k=most, **given)
    assert [(one.tokens, one.text, one.stop) for one in completions] == [
        (one.tokens, one.text, one.stop) for one in plain
    ]


def test_a_draft_is_often_right(drafted: Llama) -> None:
    passes = list(drafted.stream([[5, 6, 7], [1] * 20, [9]], 40, 0, speculate_k=4))
    assert drafted.acceptance > 0.5 and len(passes) < 25


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_model_itself_is_always_right(llama: Llama, temperature: float) -> None:
    """Sampled too, since a draft draws with the same random numbers."""
    prompts = [[5, 6, 7], [1] * 20, [9]]
    itself = Llama(llama.model, llama.tokenizer, draft=copy.deepcopy(llama.model))
    passes = list(itself.stream(prompts, 40, temperature, seed=1, speculate_k=4))
    assert itself.acceptance == 1 and len(passes) == 2 + 8


def test_a_draft_on_two_ranks(pool: RankPool, directory: Path, drafted: Llama) -> None:
    expected = drafted.complete([[1, 2, 1, 2], [3]], 20, 0.7, seed=1)
    told = on_two_ranks(pool, directory, {"draft_ckpt_dir": str(directory)})
    assert told == [([one.tokens for one in expected], 1.0)] * 2


def test_turns_of_a_session(llama: Llama, drafted: Llama) -> None:
    """Turns with either kind of proposals are the same, and the draft reads only what is new."""
    plain, looking, drafting = (Session(one) for one in (llama, llama, drafted))
    talk, shared = [], {"temperature": 0.7, "seed": 3}
    for new in ([1, 2, 3, 4, 5], [6], [7, 8, 9]):
        talk = [*talk, *new]
        turns = [list(plain.stream(talk, 20, **shared)), list(looking.stream(talk, 20, lookup_ngram=1, **shared))]
        read: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            draft, states = drafted.draft, drafted.draft.hidden_states
            patch.setattr(draft, "hidden_states", lambda t, *rest: read.append(t.shape[1]) or states(t, *rest))  # noqa: B023
            turns.append(list(drafting.stream(talk, 20, speculate_k=3, **shared)))
        assert [[step.token for step in steps] for steps in turns[1:]] == [[step.token for step in turns[0]]] * 2
        assert max(read) <= 3 + len(new) + 2, "more than what is new, and what was proposed in vain"
        assert drafting.prefilled <= len(new) + 1
        talk = [*talk, *(step.token for step in turns[0])]


def test_another_vocabulary_is_refused_before_anything_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.checkpoints.loader.load_model", None)
    with pytest.raises(LlamaError, match=r"has vocab_size 3072 and the model 512: a draft must have the same"):
        Llama.build(directory, **OPTIONS, draft_ckpt_dir=ROOT / "demo" / "model", tokenizer_path=None)


def test_memory_of_both_is_counted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Llama.build(directory, **OPTIONS).model.params
    needed = sum(memory_needed(args, 1, torch.float32))
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda _: 2 * needed - 1)
    with pytest.raises(LlamaError, match=r"GB of KV cache .* \+ .* GB of the draft model"):
        Llama.build(directory, **OPTIONS, draft_ckpt_dir=directory)
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda _: 2 * needed)
    Llama.build(directory, **OPTIONS, draft_ckpt_dir=directory)


@pytest.mark.slow
def test_commands_take_proposals(directory: Path, tmp_path: Path) -> None:
    """`complete` with a text and with a file, and `chat`, on one rank and two, give the text without proposals."""
    common = ["--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32", "--max_gen_len", "24"]
    ways = [[], ["--lookup_ngram", "1"], ["--draft_ckpt_dir", str(directory), "--speculate_k", "3"]]
    texts = [run_program("-m", "llama", "complete", "abab", *common, *way).stdout for way in ways]
    assert texts[0].strip() and texts == [texts[0]] * 3
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "abab"}\n{"prompt": "b"}\n')
    for i, (way, ranks) in enumerate(zip(ways, (0, 2, 0), strict=True)):
        output = ["--input", str(lines), "--output", str(tmp_path / f"out{i}.jsonl")]
        done = run_program("-m", "llama", "complete", *output, *common, *way, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert len({(tmp_path / f"out{i}.jsonl").read_bytes() for i in range(3)}) == 1
    done = run_program("-m", "llama", "chat", *common, *ways[2], input="/stats\nhello\n")
    assert "100% of proposed tokens right" in done.stderr
    refused = run_program("-m", "llama", "chat", *common, "--speculate_k", "0", input="hello\n")
    assert refused.returncode == 1 and refused.stderr == (
        "error: speculate_k is 0, expected a whole number of at least 1\n"
    )
