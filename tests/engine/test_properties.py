"""Results don't depend on how they are asked for: as a stream or whole, in a batch or alone, on any number of ranks.

Cases mix all settings and modes. Rounding moves logits by about 1e-6. The models' logits are far from flat, so that in
these cases, which are always the same ones, no two tokens that matter are as near to each other as that.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from property_program import (
    INTERRUPTION,
    MODELS,
    SIZES,
    answer_all,
    answered,
    built,
    called,
    described,
    fresh,
    talked,
    write_models,
)
from rank_pool import RankPool

from llama import Llama
from llama.engine.sequence import Step

ROOM, MOST_ROWS = SIZES["max_seq_len"], SIZES["max_batch_size"]
BEGIN = 256
few = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# --- what may be asked ------------------------------------------------------------------------------------------------

TEXTS = st.text("ab é漢🙂", min_size=1, max_size=12)
PROMPTS = st.one_of(
    TEXTS.map(lambda text: [BEGIN, *text.encode()][:ROOM]),  # perhaps cut in the midst of a character
    st.lists(st.integers(0, 511), min_size=1, max_size=12),
    st.lists(st.integers(97, 99), min_size=ROOM - 8, max_size=ROOM),  # which leave little room, or none
)
CHARACTERS = {0xC3: 6.0, 0xA9: 6.0, 0x61: 6.0}  # whole and broken ones: é is the first two
LENGTHS = [{"max_gen_len": most, "min_gen_len": least} for most, least in ((1, 0), (6, 3), (12, 0), (None, 2))]
CHANGES = {
    "repetition_penalty": st.sampled_from([0.6, 1.3]),
    "presence_penalty": st.sampled_from([1.0, -1.0]),
    "frequency_penalty": st.sampled_from([0.5, -2.0]),
    "logit_bias": st.sampled_from([CHARACTERS, {101: 5.0, 32: -3.0}]),
    "no_repeat_ngram_size": st.sampled_from([1, 2, 3]),
    "logits_processor": st.just("counted_on"),
    "stop_token_ids": st.sampled_from([[97], list(range(0, 256, 8))]),
}
STOPS = st.sampled_from(
    ["é", ["aé", "éa"], "�", ["a�", "aa"], ["éé�", "Ã", "b"], ["a", "éa", "�a"], ["token", "_sp", "s"]]
)
DRAWN = {
    "temperature": st.sampled_from([0, 0.7, 1.5]),
    "top_k": st.sampled_from([1, 5, 40]),
    "top_p": st.sampled_from([0.5, 1.0]),
    "min_p": st.sampled_from([0.02, 0.1]),
    "stop": STOPS,
    "seed": st.integers(0, 3),
}


def options(**more: st.SearchStrategy) -> st.SearchStrategy:
    """A random choice among all settings and `more`."""
    chosen = st.fixed_dictionaries({}, optional={**CHANGES, **more})
    return st.builds(lambda lengths, rest: {**lengths, **rest}, st.sampled_from(LENGTHS), chosen)


@st.composite
def prompts(draw: st.DrawFn, most: int) -> list[list[int]]:
    """Prompts of different lengths, some of them equal."""
    several = draw(st.lists(PROMPTS, min_size=1, max_size=3))
    return draw(st.lists(st.sampled_from(several), min_size=1, max_size=max(most, 1)))


COMMON = {"model": st.sampled_from(list(MODELS)), "prefill_chunk": st.sampled_from([3, 16, 2048])}


def cases(kind: str, **more: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"kind": st.just(kind), **COMMON, **more})


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    wanted = draw(
        options(
            **DRAWN,
            n=st.sampled_from([2, 3]),
            logprobs=st.just(True),
            top_logprobs=st.sampled_from([1, 3]),
            prompt_logprobs=st.just(True),
            lookup_ngram=st.sampled_from([1, 2]),
            speculate_k=st.sampled_from([1, 2, 4]),
        )
    )
    made = wanted.get("n", 1)
    if draw(st.booleans()) and draw(st.booleans()):
        made = wanted["best_of"] = draw(st.integers(made, 3))
    asked = draw(prompts(MOST_ROWS // made))
    if draw(st.booleans()):
        own = st.one_of(st.none(), options(**DRAWN))
        wanted["rows"] = draw(st.lists(own, min_size=len(asked), max_size=len(asked)))
    modes = cases("complete", draft=st.booleans(), ahead=st.booleans(), prompts=st.just(asked), options=st.just(wanted))
    return draw(modes)


@st.composite
def searches(draw: st.DrawFn) -> dict[str, Any]:
    num_beams = draw(st.integers(2, 4))
    beams = {
        "num_beams": st.just(num_beams),
        "temperature": st.just(0),
        "length_penalty": st.sampled_from([-1, 0, 1, 2]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "num_return_sequences": st.integers(1, num_beams),
    }
    wanted = st.builds(lambda a, b: {**a, **b}, options(), st.fixed_dictionaries(beams))
    return draw(cases("complete", prompts=prompts(MOST_ROWS // num_beams), options=wanted))


def refused(case: dict[str, Any]) -> dict[str, Any]:
    return {**case, "options": {**case["options"], "logits_processor": "refusing"}}


REFUSALS = st.one_of(completions(), searches()).map(refused)  # by a function of the caller's own, in the midst
TURNS = st.fixed_dictionaries(
    {
        "kept": st.one_of(st.just(ROOM), st.integers(0, ROOM)),
        "new": st.lists(st.integers(0, 300), min_size=1, max_size=9),
        "options": options(**DRAWN).map(lambda chosen: {**chosen, "logprobs": True}),
        "heard": st.sampled_from([1, 3, ROOM, ROOM]),
        "interrupted": st.sampled_from([False, False, False, True]),
    }
)
TALKS = cases("talk", turns=st.lists(TURNS, min_size=2, max_size=6))
READINGS = cases(
    "read",
    texts=st.lists(st.text("ab é漢🙂", min_size=1, max_size=60), min_size=1, max_size=8),
    stride=st.sampled_from([None, 1, 7, ROOM - 1]),
)

# --- whether two say the same -----------------------------------------------------------------------------------------


def alike(one: Any, other: Any) -> bool:
    """Whether two results are equal; floats only nearly."""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-4, abs=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


def assert_alike(actual: Any, expected: Any, case: Any) -> None:
    assert alike(actual, expected), f"{case}\n  says     {actual}\n  expected {expected}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("properties"))


@pytest.fixture(scope="module")
def llamas(directory: Path) -> dict[str, Llama]:
    return built(directory)


# --- one process ------------------------------------------------------------------------------------------------------


def told(answers: list[Any]) -> list[dict]:
    return [described(one) for one in answers]


@settings(few, max_examples=30)
@given(case=st.one_of(completions(), searches()))
def test_a_batch_is_its_rows(llamas: dict[str, Llama], case: dict[str, Any]) -> None:
    """A batch gives what each prompt gives alone, without proposals, draft, chunks or steps ahead; in any order too.

    Equal prompts keep their order, since without a seed it matters how often each was asked.
    """
    asked, wanted = case["prompts"], called(case["options"])
    answers = told(fresh(llamas, case).complete(asked, **wanted))
    own = wanted.pop("rows", [None] * len(asked))
    made, llama = (
        len(answers) // len(asked),
        fresh(llamas, {**case, "draft": False, "ahead": False, "prefill_chunk": 99}),
    )
    plain = {name: value for name, value in wanted.items() if name not in ("lookup_ngram", "speculate_k")}
    alone = [told(llama.complete([one], **{**plain, **(its or {})})) for one, its in zip(asked, own, strict=True)]
    assert_alike(answers, [one for each in alone for one in each], case)
    order = sorted(range(len(asked)), key=lambda i: asked[i])
    rows = {"rows": [own[i] for i in order]} if any(own) else {}
    moved = told(fresh(llamas, case).complete([asked[i] for i in order], **wanted, **rows))
    assert_alike(moved, [answers[made * i + j] for i in order for j in range(made)], case)


@settings(few, max_examples=20)
@given(case=completions())
def test_the_stream_is_the_answer(llamas: dict[str, Llama], case: dict[str, Any]) -> None:
    """The steps, joined as `Step` documents, are the completions."""
    asked, wanted = case["prompts"], called(case["options"])
    made, echo, _ = wanted.pop("n", 1), wanted.pop("prompt_logprobs", False), wanted.pop("best_of", None)
    tokenizer = fresh(llamas, case).tokenizer
    answers = fresh(llamas, case).complete(asked, n=made, prompt_logprobs=echo, **wanted)
    steps: list[list[Step]] = [[] for _ in answers]
    for some in fresh(llamas, case).stream(asked, n=made, echo=echo, **wanted):
        for step in some:
            steps[step.row].append(step)
    for one, own in zip(answers, steps, strict=True):
        if echo:
            echoed, own = own[: len(one.prompt)], own[len(one.prompt) :]
            assert [step.token for step in echoed] == one.prompt
            assert "".join(step.text for step in echoed) == tokenizer.decode(one.prompt)
        if not own:
            assert len(one.prompt) == ROOM and (one.tokens, one.text, one.finish_reason) == ([], "", "length")
            continue
        kept = own[: own[-1].length]
        assert [step.token for step in kept] == one.tokens
        assert "".join(step.text for step in own) == one.text
        assert {step.finish_reason for step in own[:-1]} <= {None}
        assert (own[-1].finish_reason, own[-1].stop) == (one.finish_reason, one.stop)
        assert one.logprobs is None or alike([step.logprob for step in kept], one.logprobs)
        assert isinstance(one.stop, str) or one.text == tokenizer.decode(one.tokens)


@settings(few, max_examples=30)
@given(case=completions(), stops=STOPS)
def test_a_stop_cuts_what_would_have_been_said(llamas: dict[str, Llama], case: dict[str, Any], stops: Any) -> None:
    """The text ends before the stop that is complete first, the longest of several; so do the tokens."""
    tokenizer, wanted = fresh(llamas, case).tokenizer, called(case["options"])
    wanted = {name: value for name, value in wanted.items() if name not in ("stop", "rows", "best_of")}
    wanted["logit_bias"] = CHARACTERS
    case["prompts"] = [[*prompt[: ROOM - 1], ord("a")] for prompt in case["prompts"]]  # no answer begins in a character
    whole = fresh(llamas, case).complete(case["prompts"], **wanted)
    answers = fresh(llamas, case).complete(case["prompts"], stop=stops, **wanted)
    for one, other in zip(answers, whole, strict=True):
        ends = [
            (other.text.index(stop) + len(stop), -len(stop), stop)
            for stop in ([stops] if isinstance(stops, str) else stops)
            if stop in other.text
        ]
        if not ends:
            assert alike(described(one), described(other))
            continue
        end, _, stop = min(ends)
        assert (one.text, one.finish_reason, one.stop) == (other.text[: end - len(stop)], "stop", stop)
        read = [tokenizer.decode(other.tokens[:count]) for count in range(len(other.tokens) + 1)]
        most = max(count for count, text in enumerate(read) if one.text.startswith(text))
        assert one.tokens == other.tokens[:most]


@settings(few, max_examples=20)
@given(case=st.one_of(completions(), searches()), texts=st.booleans(), echo=st.booleans())
def test_every_method_gives_the_same(llamas: dict[str, Llama], case: dict[str, Any], texts: bool, echo: bool) -> None:
    """`generate` and `text_completion` are `complete`; with echo, what comes before is the prompt."""
    tokenizer, wanted = fresh(llamas, case).tokenizer, called(case["options"])
    prompts = [tokenizer.decode(prompt) or "a" for prompt in case["prompts"]]  # perhaps with control tokens' names
    asked = [tokenizer.encode(text, bos=True, eos=False)[:ROOM] for text in prompts] if texts else case["prompts"]
    if wanted.get("logprobs") and echo:
        wanted["prompt_logprobs"] = True
    answers = fresh(llamas, case).complete(asked, **wanted)
    tokens, chances = fresh(llamas, case).generate(asked, echo=echo, **wanted)
    assert tokens == [(one.prompt if echo else []) + one.tokens for one in answers]
    assert (chances is None) == (not wanted.get("logprobs"))
    if chances is not None:
        assert alike(chances, [((one.prompt_logprobs or []) if echo else []) + one.logprobs for one in answers])
    if texts and all(len(tokenizer.encode(text, bos=True, eos=False)) <= ROOM for text in prompts):
        made = len(answers) // len(prompts)
        said = fresh(llamas, case).text_completion(prompts, echo=echo, **wanted)
        for i, (one, other) in enumerate(zip(answers, said, strict=True)):
            before = tokenizer.decode(asked[i // made][1:]) if echo else ""
            assert other["generation"] == before + one.text
            assert (other["finish_reason"], other.get("stop")) == (one.finish_reason, one.stop)
            assert alike(other.get("score"), one.score)


@settings(few, max_examples=12)
@given(case=TALKS)
def test_a_talk_is_its_turns(llamas: dict[str, Llama], case: dict[str, Any]) -> None:
    """Each turn of a session is as if the whole conversation were one prompt."""
    other = fresh(llamas, case)
    for turn, said in zip(case["turns"], talked(fresh(llamas, case), case), strict=True):
        stream = other.stream([said["prompt"]], **called(turn["options"]))
        steps = [asdict(step) for _, (step,) in zip(range(turn["heard"]), stream, strict=False)]
        assert_alike(said["steps"], steps, case)
        if turn["interrupted"]:
            other.complete(INTERRUPTION, 2)


@settings(few, max_examples=8)
@given(case=READINGS)
def test_a_text_is_read_by_itself(llamas: dict[str, Llama], case: dict[str, Any]) -> None:
    """The other texts, their order and the number of passes make no difference."""
    scores, vectors = answered(llamas, case)
    moved = answered(llamas, {**case, "texts": case["texts"][::-1], "prefill_chunk": 2048})
    assert_alike([scores, vectors], [moved[0][::-1], [each[::-1] for each in moved[1]]], case)
    for text, score in zip(case["texts"], scores, strict=True):
        assert_alike(answered(llamas, {**case, "texts": [text]})[0], [score], case)


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(llamas: dict[str, Llama], directory: Path) -> list[tuple[dict[str, Any], Any]]:
    """Cases of all kinds, and what this process answers."""
    cases_of_all_kinds: list[dict[str, Any]] = []
    for kind, count in ((completions(), 24), (searches(), 6), (TALKS, 5), (READINGS, 2), (REFUSALS, 4)):

        @settings(few, max_examples=count, phases=[Phase.generate])
        @given(case=kind)
        def collect(case: dict[str, Any]) -> None:
            cases_of_all_kinds.append(case)

        collect()
    return [(case, answered(llamas, case)) for case in cases_of_all_kinds]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_is_one(
    pool: RankPool, directory: Path, drawn: list[tuple[dict[str, Any], Any]], ranks: int
) -> None:
    cases = [case for case, _ in drawn]
    for told in pool.run(answer_all, directory, cases, ranks=ranks, timeout=300).results:
        assert len(told) == len(drawn)
        for said, (case, expected) in zip(told, drawn, strict=True):
            assert_alike(said, expected, case)
