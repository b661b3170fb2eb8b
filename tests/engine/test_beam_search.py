"""Beam search against transformers': the same answers with the same scores, on small random models with equal weights.

Stops are drawn anew for each case, so that beams end at different times; what processes logprobs is written here.
"""

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from beam_program import search
from conftest import Twin, make_twin, numbers_in, to_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from tiny import write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError
from llama.bench.subjects import NoText
from llama.engine import rows
from llama.engine.beam_search import NO_SCORE, Beam, Beams, Process, beam_search
from llama.engine.engine import Engine
from llama.model import ModelArgs, Transformer
from llama.parallel import Place

SIZES = ModelArgs(32, 2, 4, 2, 61, 16, None, 1e-5, 10000, max_batch_size=20, max_seq_len=40)
CHUNK = 2048
KINDS = [True, False, "never"]


@cache
def twin(seed: int) -> Twin:
    """The sizes above with weights of this seed. Needs the fixture `place`."""
    made = make_twin(SIZES)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.theirs.parameters():
            weight += torch.randn(weight.shape, generator=chance) * 0.3
    made.ours.load_state_dict(to_meta(made.theirs.state_dict(), SIZES), strict=True)
    made.theirs.generation_config.eos_token_id = None
    return made


def make_engine(model: Transformer, chunk: int = CHUNK) -> Engine:
    return Engine(model, NoText(), 1, chunk, None)


@dataclass(frozen=True)
class Case:
    prompts: list[list[int]]
    beams: Beams
    max_gen_len: int
    stops: frozenset[int]

    @staticmethod
    def drawn(seed: int, early_stopping: Any, most_prompts: int = 4) -> "Case":
        """Sizes and settings that fit, with so few words that a stop is chosen often."""
        chance = random.Random(seed)
        stops = frozenset(chance.sample(range(61), chance.choice([0, 1, 2, 4, 8])))
        words = [word for word in range(61) if word not in stops]
        prompts = [chance.choices(words, k=chance.randint(1, 15)) for _ in range(chance.randint(1, most_prompts))]
        num_beams = chance.randint(2, 5)
        beams = Beams(num_beams, chance.choice([-1, 0, 1, 2]), early_stopping, chance.randint(1, num_beams))
        return Case(prompts, beams, chance.randint(1, 25), stops)

    def ours(self, model: Transformer, process: Process | None = None, chunk: int = CHUNK) -> list[list[Beam]]:
        return beam_search(make_engine(model, chunk), self.prompts, self.beams, self.max_gen_len, self.stops, process)

    def theirs(self, model: Any, **options: Any) -> list[list[Beam]]:
        """What transformers answers. Prompts are padded on the left with a stop, which no prompt and no beam has."""
        longest = max(map(len, self.prompts))
        pad = min(self.stops, default=0)
        output = model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in self.prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts]),
            num_beams=self.beams.num_beams,
            length_penalty=float(self.beams.length_penalty),
            early_stopping=self.beams.early_stopping,
            num_return_sequences=self.beams.num_return_sequences,
            max_new_tokens=self.max_gen_len,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=pad,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        rows = zip(output.sequences[:, longest:].tolist(), output.sequences_scores.tolist(), strict=True)
        listed = [self.as_beam(tokens, score) for tokens, score in rows]
        each = self.beams.num_return_sequences
        return [listed[a : a + each] for a in range(0, len(listed), each)]

    def as_beam(self, tokens: list[int], score: float) -> Beam:
        for place, token in enumerate(tokens):
            if token in self.stops:
                return Beam(tokens[:place], score, "stop", token)
        assert len(tokens) == self.max_gen_len
        return Beam(tokens, score, "length")


def assert_same(actual: list[list[Beam]], expected: list[list[Beam]]) -> None:
    assert [len(row) for row in actual] == [len(row) for row in expected]
    for mine, other in zip(chain(*actual), chain(*expected), strict=True):
        assert mine == replace(other, score=mine.score)
        assert mine.score == pytest.approx(other.score, rel=1e-4, abs=1e-4)


# --- processing of logprobs, written from what transformers documents ------------------------------------------------


def no_repeat(size: int) -> Process:
    """Ban what would repeat `size` tokens in a row, in prompt and answer together."""

    def process(logprobs: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        tokens = [*prompt, *answer]
        seen = [tokens[a : a + size] for a in range(len(tokens) - size + 1)]
        start = tokens[len(tokens) - size + 1 :]
        return banned(logprobs, [gram[-1] for gram in seen if gram[:-1] == start])

    return process


def banned(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    return logprobs.index_fill(0, torch.tensor(tokens, dtype=torch.long), -math.inf)


def less_of_what_was(logprobs: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """A repetition penalty of 1.5. All logprobs are negative, and negative numbers are multiplied."""
    there = torch.tensor(sorted({*prompt, *answer}))
    return logprobs.index_copy(0, there, logprobs[there] * 1.5)


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", KINDS)
@pytest.mark.parametrize("seed", range(16))
def test_equals_transformers(place: Place, seed: int, early_stopping: Any) -> None:
    both = twin(seed)
    for more in range(4):
        case = Case.drawn(100 * seed + more, early_stopping)
        assert_same(case.ours(both.ours), case.theirs(both.theirs))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_transformers_for_any_settings(place: Place, data: st.DataObject) -> None:
    num_beams = data.draw(st.integers(2, 5))
    stops = data.draw(st.frozensets(st.integers(0, 60), max_size=10))
    words = st.sampled_from([word for word in range(61) if word not in stops])
    beams = Beams(
        num_beams,
        data.draw(st.sampled_from([-2.5, -1, -0.3, 0, 0.7, 1, 2])),
        data.draw(st.sampled_from(KINDS)),
        data.draw(st.integers(1, num_beams)),
    )
    prompts = data.draw(st.lists(st.lists(words, min_size=1, max_size=20), min_size=1, max_size=4))
    case = Case(prompts, beams, data.draw(st.integers(1, 20)), stops)
    both = twin(data.draw(st.integers(0, 5)))
    assert_same(case.ours(both.ours), case.theirs(both.theirs))


@pytest.mark.parametrize(("seed", "penalty"), [(12, -0.2), (193, -0.5), (417, -0.2)])
def test_never_looks_no_further_where_short_answers_are_favoured(place: Place, seed: int, penalty: float) -> None:
    """Rare cases, searched for: with a negative length penalty, an answer that ends now is the best still possible."""
    both = twin(seed % 16)
    case = Case.drawn(seed, "never", most_prompts=1)
    beams = replace(case.beams, length_penalty=penalty, num_return_sequences=case.beams.num_beams)
    case = replace(case, max_gen_len=25, beams=beams)
    assert_same(case.ours(both.ours), case.theirs(both.theirs))


def test_the_cases_are_of_all_kinds(place: Place) -> None:
    """The cases contain what matters: beams that end in different ways and at different times."""
    beams: list[Beam] = []
    unlike = 0
    for seed in range(16):
        answers = Case.drawn(100 * seed, False).ours(twin(seed).ours)
        unlike += any(len({len(beam.tokens) for beam in row}) > 1 for row in answers)
        beams += chain(*answers)
    reasons = [beam.finish_reason for beam in beams]
    assert min(reasons.count("stop"), reasons.count("length")) >= len(beams) / 5
    assert len({beam.stop for beam in beams}) > 5 and unlike >= 4


PROCESSES: dict[str, tuple[dict[str, Any], Callable[[Case], Process]]] = {
    "no word twice": ({"no_repeat_ngram_size": 1}, lambda case: no_repeat(1)),
    "no pair twice": ({"no_repeat_ngram_size": 2}, lambda case: no_repeat(2)),
    "no three twice": ({"no_repeat_ngram_size": 3}, lambda case: no_repeat(3)),
    "repetition penalty": ({"repetition_penalty": 1.5}, lambda case: less_of_what_was),
    "not too short": (
        {"min_new_tokens": 4},
        lambda case: lambda logprobs, _, answer: banned(logprobs, sorted(case.stops) if len(answer) < 4 else []),
    ),
    "few words": (  # fewer than there are beams
        {"prefix_allowed_tokens_fn": lambda batch, tokens: [1, 2, 3]},
        lambda case: lambda logprobs, _, answer: banned(logprobs, [0, *range(4, 61)]),
    ),
}


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("seed", range(12))
def test_processing_equals_transformers(place: Place, kind: str, seed: int) -> None:
    """One prompt at a time: transformers' processors take padding for words."""
    options, process = PROCESSES[kind]
    both = twin(seed % 4)
    case = Case.drawn(seed, KINDS[seed % 3], most_prompts=1)
    if kind == "few words":
        case = replace(case, stops=case.stops | {3}, beams=replace(case.beams, num_beams=4, num_return_sequences=1))
    if kind.startswith("no"):
        case = replace(case, prompts=[case.prompts[0] * 2])  # something to repeat
    case = replace(case, max_gen_len=min(case.max_gen_len + 5, SIZES.max_seq_len - len(case.prompts[0])))
    assert_same(case.ours(both.ours, process(case)), case.theirs(both.theirs, **options))


@pytest.mark.parametrize("seed", range(6))
def test_each_prompt_has_its_own_room(place: Place, seed: int) -> None:
    """An answer fits max_seq_len whatever the other prompts' lengths; without room the answer is empty."""
    both = twin(seed)
    case = Case.drawn(seed, KINDS[seed % 3])
    words = [word for word in range(61) if word not in case.stops]
    lengths = [SIZES.max_seq_len - room for room in (1, 0, 7, 3)]
    case = replace(case, prompts=[random.Random(seed).choices(words, k=k) for k in lengths], max_gen_len=5)
    answers = case.ours(both.ours)
    assert answers[1] == [Beam([], NO_SCORE, "length")] * case.beams.num_return_sequences
    for i, room in ((0, 1), (2, 5), (3, 3)):
        alone = replace(case, prompts=[case.prompts[i]], max_gen_len=room)
        assert_same([answers[i]], alone.theirs(both.theirs))


# --- against itself --------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], max_gen_len: int, stops: frozenset[int]) -> tuple[list[int], float]:
    """Greedy search by forwards without a cache: the tokens, and the mean logprob with the stop's."""
    tokens, chances = list(prompt), []
    while len(chances) < max_gen_len:
        logprobs = torch.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)
        tokens.append(int(logprobs.argmax()))
        chances.append(float(logprobs.max()))
        if tokens[-1] in stops:
            return tokens[len(prompt) : -1], sum(chances) / len(chances)
    return tokens[len(prompt) :], sum(chances) / len(chances)


@pytest.mark.parametrize("early_stopping", KINDS)
def test_one_beam_is_greedy(place: Place, early_stopping: Any) -> None:
    model = twin(0).ours
    for seed in range(8):
        case = replace(Case.drawn(seed, False), beams=Beams(1, early_stopping=early_stopping))
        for prompt, (beam,) in zip(case.prompts, case.ours(model), strict=True):
            tokens, score = greedy(model, prompt, case.max_gen_len, case.stops)
            assert (beam.tokens, beam.score) == (tokens, pytest.approx(score, abs=1e-4))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), early_stopping=st.sampled_from(KINDS), chunk=st.integers(1, 30))
def test_batch_equals_single_prompts(place: Place, seed: int, early_stopping: Any, chunk: int) -> None:
    """The other prompts, and the number of passes that read the prompts, make no difference."""
    model = twin(seed % 4).ours
    case = Case.drawn(seed, early_stopping)
    case = replace(case, prompts=[prompt * (1 + seed % 3) for prompt in case.prompts])  # so that room differs
    case = replace(case, prompts=[prompt[:40] for prompt in case.prompts])
    alone = [replace(case, prompts=[prompt]).ours(model)[0] for prompt in case.prompts]
    assert_same(case.ours(model, no_repeat(3), chunk), case.ours(model, no_repeat(3)))
    assert_same(case.ours(model, chunk=chunk), alone)


def test_answers_are_different_and_the_best_comes_first(place: Place) -> None:
    for seed in range(12):
        case = Case.drawn(seed, KINDS[seed % 3])
        for row in case.ours(twin(seed).ours):
            assert len({(*beam.tokens, beam.stop) for beam in row}) == len(row)
            assert all(better.score >= worse.score for better, worse in pairwise(row))


def test_more_is_banned_than_a_search_can_do_without(place: Place) -> None:
    """All tokens are banned after two: the only answers are those that ended by then."""
    engine = make_engine(twin(0).ours)

    def process(logprobs: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        return banned(logprobs, range(61) if len(answer) == 2 else [*range(5), *range(7, 61)])

    missing = Beam([], NO_SCORE, "length")
    (answers,) = beam_search(engine, [[1, 2]], Beams(3, num_return_sequences=3), 9, frozenset([6]), process)
    assert [(beam.tokens, beam.stop) for beam in answers[:2]] in ([([], 6), ([5], 6)], [([5], 6), ([], 6)])
    assert answers[2:] == [missing]
    (answers,) = beam_search(engine, [[1, 2]], Beams(3), 9, frozenset(), process)
    assert answers == [missing]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_at_every_step_a_row_has_the_state_of_its_own_tokens(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However branches move between slots. And no token of a branch is computed again for its successors."""
    both = twin(1)
    case = Case(
        [[5, 6, 7, 8], [9] * 6, list(range(10, 17))], Beams(4, num_return_sequences=4), 12, frozenset(range(20, 24))
    )
    fresh = Transformer(replace(SIZES))
    fresh.load_state_dict(both.ours.state_dict())
    run = both.ours.hidden_states
    branched, widths = 0, []

    def watch(tokens: Tensor, start_pos: Any, *rest: Any) -> Tensor:
        nonlocal branched
        h = run(tokens, start_pos, *rest)
        texts = [sequence.tokens for sequence in rows()]
        for i, text in enumerate(texts):
            piece = text[int(start_pos[i]) :][: tokens.shape[1]]
            assert tokens[i, : len(piece)].tolist() == piece
            expected = fresh.hidden_states(torch.tensor([text]), 0)[0, int(start_pos[i]) :][: len(piece)]
            torch.testing.assert_close(h[i, : len(piece)], expected, rtol=1e-3, atol=1e-4)
        branched += len({tuple(text[:-1]) for text in texts}) < len(texts)
        widths.append(tokens.shape[1])
        return h

    monkeypatch.setattr(both.ours, "hidden_states", watch)
    case.ours(both.ours)
    assert branched >= 5 and set(widths[2:]) == {1} and len(widths) <= 13


@pytest.mark.parametrize("seed", range(4))
def test_searches_may_need_more_rows_and_slots_than_there_are(place: Place, seed: int) -> None:
    """Branches take turns, and what the cache has no room for is computed again."""
    model = twin(seed).ours
    narrow = Transformer(replace(SIZES, max_batch_size=1))
    narrow.load_state_dict(model.state_dict())
    case = Case.drawn(seed, KINDS[seed % 3])
    assert_same(case.ours(narrow), case.ours(model))


def test_searches_of_one_engine_run_beside_each_other_and_leave_nothing(place: Place) -> None:
    """In threads, beside requests that take the same prompts; afterwards no slot is kept."""
    engine = make_engine(twin(2).ours)
    cases = [Case.drawn(seed, KINDS[seed % 3]) for seed in range(6)]

    def run(case: Case) -> list[list[Beam]]:
        return beam_search(engine, case.prompts, case.beams, case.max_gen_len, case.stops)

    expected = [case.ours(engine.model) for case in cases]
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(run, cases))
    for result, other in zip(results, expected, strict=True):
        assert_same(result, other)
    assert engine.stepper.scheduler.running == 0 and engine.stepper.scheduler.book.held == 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_beams": 0}, "num_beams is 0, expected a whole number of at least 1"),
        ({"num_beams": 2.0}, "num_beams is 2.0, expected a whole number of at least 1"),
        ({"num_beams": True}, "num_beams is True, expected a whole number of at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0, expected a whole number of at least 1"),
        ({"num_return_sequences": 4}, "num_return_sequences is 4, expected a whole number from 1 to num_beams, .* 3"),
        ({"length_penalty": math.nan}, "length_penalty is nan, expected a number from -32 to 32"),
        ({"length_penalty": 33}, "length_penalty is 33, expected a number from -32 to 32"),
        ({"length_penalty": "1"}, "length_penalty is '1', expected a number from -32 to 32"),
        ({"early_stopping": 1}, "early_stopping is 1, expected True, False or 'never'"),
        ({"early_stopping": "always"}, "early_stopping is 'always', expected True, False or 'never'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(LlamaError, match=names):
        Beams(**{"num_beams": 3, **options})


def test_what_does_not_fit_is_refused_before_any_forward_pass(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(0).ours
    engine = make_engine(model)
    monkeypatch.setattr(model, "hidden_states", lambda *_: pytest.fail("a forward pass was made"))

    def refused(prompts: Any, num_beams: int = 2, max_gen_len: Any = 5) -> str:
        with pytest.raises(LlamaError) as caught:
            beam_search(engine, prompts, Beams(num_beams), max_gen_len, frozenset())
        return str(caught.value)

    assert "no prompt" in refused([])
    assert "prompt 1 is empty" in refused([[1], []])
    assert "61" in refused([[61]])
    assert {"41", "40"} <= numbers_in(refused([[1] * 41]))
    assert "max_gen_len is 0" in refused([[1]], max_gen_len=0)


def test_logits_that_are_not_finite_are_an_error(place: Place) -> None:
    model = Transformer(replace(SIZES))
    model.load_state_dict(twin(0).ours.state_dict())
    torch.nn.init.constant_(model.output.weight, math.inf)
    with pytest.raises(LlamaError, match="row 0: the logits at position 2 are not finite"):
        beam_search(make_engine(model), [[1, 2]], Beams(2), 5, frozenset())


# --- models as they are built ----------------------------------------------------------------------------------------

RAGGED = [[72, 101, 108, 108, 111], [97], list(range(100, 130))]
OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 12, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("beams") / "ckpt")


def searched(model: Transformer) -> list[list[Beam]]:
    return beam_search(make_engine(model), RAGGED, Beams(4, num_return_sequences=4), 20, frozenset(range(0, 512, 16)))


@pytest.fixture(scope="module")
def plainly(directory: Path, place: Place) -> list[list[Beam]]:
    """By the plain network: no packed layers, no kernels, no captured steps."""
    fast = Llama.build(directory, **OPTIONS).model
    model = Transformer(fast.params)
    model.load_state_dict(fast.state_dict())
    return searched(model)


def test_fast_forms_find_the_same(directory: Path, plainly: list[list[Beam]]) -> None:
    assert_same(searched(Llama.build(directory, **OPTIONS).model), plainly)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same(directory: Path, plainly: list[list[Beam]]) -> None:
    answers = searched(Llama.build(directory, **{**OPTIONS, "device": "cuda"}).model)
    for row, other in zip(answers, plainly, strict=True):
        assert [(beam.tokens, beam.stop) for beam in row] == [(beam.tokens, beam.stop) for beam in other]
        assert [beam.score for beam in row] == pytest.approx([beam.score for beam in other], abs=1e-3)


def test_two_ranks_find_the_same(pool: RankPool, directory: Path, plainly: list[list[Beam]]) -> None:
    """Both ranks return the same, and an error on the rank that chooses is raised on both."""
    expected = [[(beam.tokens, beam.stop) for beam in row] for row in plainly]
    for answers, refused in pool.run(search, str(directory), RAGGED, ranks=2).results:
        assert [[(beam.tokens, beam.stop) for beam in row] for row in answers] == expected
        assert "the process says no" in refused
