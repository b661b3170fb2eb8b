"""What a caller may ask of an answer: its own settings, a seed, several answers, stops, and what results tell of it.

On a tiny random model, whose vocabulary is the bytes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from completion_program import complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from tiny import ARGS, PROMPTS, write_checkpoint

from llama import Llama, LlamaError
from llama.model import Transformer

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 8, "device": "cpu", "dtype": "float32"}
few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS, endless=True)


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Transformer:
    return Llama.build(tiny_dir, **OPTIONS).model


@pytest.fixture
def llama(tiny_dir: Path, model: Transformer) -> Llama:
    from llama.tokenization.hf_tokenizer import open_tokenizer

    return Llama(model, open_tokenizer(tiny_dir / "tokenizer.model"))


def ids(text: str) -> list[int]:
    return [256, *text.encode()]  # begin_of_text, and a token for each byte


def texts(answers: list[dict]) -> list[str]:
    return [answer["generation"] for answer in answers]


# --- a row is its own -------------------------------------------------------------------------------------------------

ROW_SETTINGS = st.fixed_dictionaries(
    {"seed": st.integers(0, 5)},
    optional={
        "temperature": st.sampled_from([0, 0.7, 1.5]),
        "top_k": st.sampled_from([None, 1, 5, 40]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0, 1.0]),
        "frequency_penalty": st.sampled_from([0, -0.5]),
        "logit_bias": st.sampled_from([{}, {101: 5.0, 32: -3.0}]),
        "no_repeat_ngram_size": st.sampled_from([0, 2]),
        "max_gen_len": st.integers(1, 12),
        "stop": st.sampled_from([(), ("e",), ("a", "th")]),
    },
)


@few
@given(rows=st.lists(st.tuples(st.text("abc é", min_size=1, max_size=20), ROW_SETTINGS), min_size=1, max_size=6))
def test_a_rows_answer_is_its_own(llama: Llama, rows: list[tuple[str, dict]]) -> None:
    """A row's answer doesn't depend on its neighbours or its place, and the stream gives the same as `complete`."""
    prompts, own = [ids(text) for text, _ in rows], [{"max_gen_len": 12, **setting} for _, setting in rows]
    together = llama.complete(prompts, logprobs=True, rows=own)
    backwards = llama.complete(prompts[::-1], logprobs=True, rows=own[::-1])[::-1]
    streamed = [""] * len(rows)
    for steps in llama.stream(prompts, rows=own):
        for step in steps:
            streamed[step.row] += step.text
    for i, (prompt, setting) in enumerate(zip(prompts, own, strict=True)):
        (alone,) = llama.complete([prompt], logprobs=True, **{"temperature": 0.6, "top_p": 0.9, **setting})
        for other in (together[i], backwards[i]):
            assert (other.tokens, other.text, other.finish_reason, other.stop) == (
                alone.tokens,
                alone.text,
                alone.finish_reason,
                alone.stop,
            )
            assert other.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert streamed[i] == alone.text


def test_a_seed_says_all(llama: Llama) -> None:
    """The same seed gives the same answer, of another Llama too; n answers differ, as do other seeds and prompts."""
    first = texts(llama.text_completion(["hello"], 1.0, max_gen_len=12, seed=3))
    again = texts(llama.text_completion(["x", "hello"], 1.0, max_gen_len=12, seed=3))
    assert again[1:] == first
    several = texts(llama.text_completion(["hello"], 1.0, max_gen_len=12, seed=3, n=4))
    assert several[:1] == first and len(set(several)) == 4
    assert texts(llama.text_completion(["hello"], 1.0, max_gen_len=12, seed=4)) != first


def test_a_seeds_answer_on_two_ranks(pool: RankPool, tiny_dir: Path) -> None:
    rows = [{"seed": 1}, {"seed": 2, "top_k": 5}, {"temperature": 0, "repetition_penalty": 1.3}]
    asked = [[[256, 97], [256, 98, 99], [100]], 12, 1.0]
    options = {"n": 2, "rows": rows, "top_logprobs": 2}
    told = [
        [[one["tokens"], one["text"], one["finish_reason"]] for one in answers]
        for ranks in (1, 2)
        for answers, _ in pool.run(complete, str(tiny_dir), OPTIONS, asked, options, ranks=ranks).results
    ]
    one, two, other = told
    assert one == two == other and len(one) == 6


# --- several ----------------------------------------------------------------------------------------------------------


def test_n_answers_share_their_prefill(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, hidden_states = [], llama.model.hidden_states

    def counting(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return hidden_states(tokens, *rest)

    monkeypatch.setattr(llama.model, "hidden_states", counting)
    prompts = [ids("a long prompt, of which there is one"), ids("short")]
    completions = llama.complete(prompts, 6, 1.0, n=3, seed=1)
    assert sum(rows * length for rows, length in seen if length > 1) <= sum(map(len, prompts)) + 32
    monkeypatch.undo()
    expected = [llama.complete([prompt], 6, 1.0, n=3, seed=1) for prompt in prompts]
    assert [one.tokens for one in completions] == [one.tokens for each in expected for one in each]
    assert [one.prompt for one in completions] == [prompts[0]] * 3 + [prompts[1]] * 3


def test_best_of_gives_the_likeliest(llama: Llama) -> None:
    made = llama.complete([ids("hello"), ids("b")], 8, 1.5, logprobs=True, n=4, seed=1)
    best = llama.complete([ids("hello"), ids("b")], 8, 1.5, logprobs=True, n=2, best_of=4, seed=1)
    for place in range(2):
        means = [sum(one.logprobs) / len(one.tokens) for one in made[4 * place : 4 * place + 4]]
        expected = sorted(range(4), key=lambda i: -means[i])[:2]
        assert [one.tokens for one in best[2 * place : 2 * place + 2]] == [made[4 * place + i].tokens for i in expected]
    assert all(one.logprobs is None for one in llama.complete([ids("b")], 8, n=1, best_of=2))


def test_an_answer_that_ends_at_once_is_as_likely_as_its_stop(llama: Llama) -> None:
    """The mean logprob counts all tokens that were chosen, the stop included."""
    shared = {"max_gen_len": 8, "temperature": 1.5, "seed": 1, "stop_token_ids": list(range(0, 256, 2))}
    completions = llama.complete([ids("b")], n=8, logprobs=True, **shared)
    assert [] in [one.tokens for one in completions] and len({one.mean_logprob for one in completions}) > 1
    stopped = [one for one in completions if one.finish_reason == "stop"]
    chance = torch.log_softmax(llama.model(torch.tensor([ids("b")]))[0, -1].detach(), -1)
    for one in (one for one in stopped if not one.tokens):
        assert one.mean_logprob == pytest.approx(float(chance[one.stop]), abs=1e-4)
    (best,) = llama.complete([ids("b")], n=1, best_of=8, logprobs=True, **shared)
    assert best == max(completions, key=lambda one: one.mean_logprob)


# --- where it stops ---------------------------------------------------------------------------------------------------


def test_a_stop_is_found_across_tokens(llama: Llama) -> None:
    """A stop of any length at any place of a greedy text ends it, and is in neither the stream nor the tokens."""
    whole = llama.complete([ids("hello")], 40, 0)[0]
    for start in range(0, len(whole.text), 3):
        for length in (1, 2, 3, 5):
            stop = whole.text[start : start + length]
            first = whole.text.find(stop)
            (completion,) = llama.complete([ids("hello")], 40, 0, logprobs=True, stop=[stop, "never to be seen"])
            assert (completion.text, completion.finish_reason, completion.stop) == (whole.text[:first], "stop", stop)
            assert whole.tokens[: len(completion.tokens)] == completion.tokens
            assert completion.text.startswith(llama.tokenizer.decode(completion.tokens)) and len(
                completion.logprobs
            ) == len(completion.tokens)
            streamed = [step.text for (step,) in llama.stream([ids("hello")], 40, 0, stop=stop)]
            assert "".join(streamed) == completion.text


def test_a_stop_of_characters_that_are_several_tokens(llama: Llama) -> None:
    """Each byte is a token here, and a processor makes the model write the same characters again and again."""
    text = "é漢🙂"
    wanted = iter(text.encode() * 3)

    def write(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -1e9).index_fill(0, torch.tensor([next(wanted)]), 0)

    (completion,) = llama.complete([ids("x")], 20, 0, stop="🙂é", logits_processor=write)
    assert (completion.text, completion.stop) == ("é漢", "🙂é")
    assert llama.tokenizer.decode(completion.tokens) == "é漢"


def test_stop_tokens_of_the_caller(llama: Llama) -> None:
    whole = llama.complete([ids("hello")], 30, 0)[0]
    (completion,) = llama.complete([ids("hello")], 30, 0, stop_token_ids=[whole.tokens[7]])
    place = whole.tokens.index(whole.tokens[7])
    assert (completion.tokens, completion.finish_reason, completion.stop) == (
        whole.tokens[:place],
        "stop",
        whole.tokens[7],
    )
    (later,) = llama.complete([ids("hello")], 30, 0, stop_token_ids=[whole.tokens[0]], min_gen_len=4)
    assert len(later.tokens) >= 4 and whole.tokens[0] not in later.tokens[:4]


def test_every_result_says_why_it_ended(llama: Llama) -> None:
    (length,) = llama.text_completion(["hello"], 0, max_gen_len=5)
    assert (length["finish_reason"], "stop" in length) == ("length", False)
    text = length["generation"]
    (stopped,) = llama.text_completion(["hello"], 0, max_gen_len=5, stop=text[-1])
    assert (stopped["finish_reason"], stopped["stop"]) == ("stop", text[-1])
    (chat,) = llama.chat_completion([[{"role": "user", "content": "hi"}]], 0, max_gen_len=5)
    assert chat["finish_reason"] == "length"
    (full,) = llama.complete([[1] * 96])
    assert (full.tokens, full.finish_reason) == ([], "length")


# --- what is told -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_likeliest_tokens_and_the_prompts(llama: Llama) -> None:
    prompts = [ids("hello there"), ids("b")]
    completions = llama.complete(prompts, 7, 1.0, logprobs=True, prompt_logprobs=True, top_logprobs=4, seed=1)
    for one in completions:
        row = one.prompt + one.tokens
        expected = torch.log_softmax(llama.model(torch.tensor([row]))[0], -1)
        start = len(one.prompt)
        assert len(one.top_logprobs) == len(one.tokens) == len(one.logprobs)
        for place, (token, chance, likeliest) in enumerate(
            zip(one.tokens, one.logprobs, one.top_logprobs, strict=True)
        ):
            here = expected[start + place - 1]
            assert chance == pytest.approx(here[token].item(), abs=1e-4)
            best = here.topk(4)
            assert [t for t, _ in likeliest] == best.indices.tolist()
            assert [c for _, c in likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
        known = [expected[i, token].item() for i, token in enumerate(one.prompt[1:])]
        assert one.prompt_logprobs == pytest.approx([0.0, *known], abs=1e-4)
    (told,) = llama.text_completion(["hi"], 0, max_gen_len=3, logprobs=True, top_logprobs=2, prompt_logprobs=True)
    assert len(told["top_logprobs"]) == len(told["tokens"]) == 3 and len(told["top_logprobs"][0]) == 2
    assert len(told["prompt_logprobs"]) == 3


# --- what can't be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0, expected a whole number of at least 1"),
        ({"n": 3, "best_of": 2}, "best_of is 2 and n is 3"),
        ({"top_logprobs": -1}, "top_logprobs is -1, expected a whole number in [0, 512]"),
        ({"logit_bias": {512: 1}}, "logit_bias has token 512, expected whole numbers in [0, 512)"),
        ({"stop_token_ids": [700]}, "stop_token_ids has token 700"),
        ({"rows": [{}, {}]}, "rows has 2 entries, expected a list of 1"),
        ({"rows": [{"top_k": 0}]}, "rows[0]: top_k is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_forward_pass(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    monkeypatch.setattr(llama.model, "hidden_states", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(LlamaError) as error:
        llama.text_completion(["hello"], **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_when_no_token_is_left(llama: Llama) -> None:
    def forbid(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, float("-inf"))

    with pytest.raises(LlamaError, match="row 1: no token is left to choose at position 2"):
        llama.complete([[1, 2], [3, 4]], 5, rows=[None, {"logits_processor": forbid}])


def test_all_at_once(llama: Llama) -> None:
    """One call with ragged prompts, n, stops, settings of rows and logprobs says what single calls say."""
    own = [{"stop": "e", "seed": 1}, {"top_k": 3, "seed": 2, "max_gen_len": 4}, {"temperature": 0}, None]
    prompts = [ids(prompt) for prompt in PROMPTS]
    completions = llama.complete(prompts, 10, 1.2, logprobs=True, n=2, rows=own, seed=9)
    for i, prompt in enumerate(prompts):
        alone = llama.complete(
            [prompt], **{"max_gen_len": 10, "temperature": 1.2, "seed": 9, "logprobs": True, "n": 2, **(own[i] or {})}
        )  # fmt: skip
        assert [(one.tokens, one.text, one.stop) for one in completions[2 * i : 2 * i + 2]] == [
            (one.tokens, one.text, one.stop) for one in alone
        ]


# --- beams (test_beams.py compares the search with transformers) ------------------------------------------------------


def test_beams_come_as_texts(llama: Llama) -> None:
    prompts = ["hello", "a longer prompt"]
    predictions = llama.text_completion(prompts, 0, max_gen_len=6, num_beams=3, num_return_sequences=2)
    assert len(predictions) == 4 and all(one["finish_reason"] == "length" for one in predictions)
    assert all(predictions[i]["score"] >= predictions[i + 1]["score"] for i in (0, 2))
    alone = llama.text_completion(prompts[1:], 0, max_gen_len=6, num_beams=3, num_return_sequences=2)
    assert [one["generation"] for one in alone] == [one["generation"] for one in predictions[2:]]
    plain = llama.complete([ids("hello")], 6, 0, num_beams=3)
    varied = llama.complete([ids("hello")], 6, 0, num_beams=3, no_repeat_ngram_size=1)
    assert len(set(varied[0].tokens)) == len(varied[0].tokens)
    assert plain[0].score >= varied[0].score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.6}, "num_beams is 3 and temperature 0.6: .* set temperature to 0 or drop num_beams"),
        ({"n": 2}, "num_beams is 3 and n was given: drop one of them; num_return_sequences says how many"),
        ({"best_of": 2}, "num_beams is 3 and best_of was given: drop one"),
        ({"stop": "x"}, "num_beams is 3 and stop was given: drop one"),
        ({"logprobs": True}, "num_beams is 3 and logprobs was given: drop one"),
        ({"rows": [{}]}, "num_beams is 3 and rows was given"),
        ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty was given without beams: drop it, or set num_beams"),
        ({"num_return_sequences": 4}, "num_return_sequences is 4, expected a whole number from 1 to num_beams"),
        ({"early_stopping": "ever"}, "early_stopping is 'ever'"),
    ],
)
def test_what_contradicts_beams_is_refused(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    monkeypatch.setattr(llama.model, "hidden_states", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(LlamaError, match=message):
        llama.text_completion(["hello"], **{"temperature": 0, "num_beams": 3, **arguments})
