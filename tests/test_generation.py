"""Generation through public names, on a tiny random model: batches, streams, seeds, logprobs, stopping, refusals."""

import copy
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ARGS, PROMPTS, greedy_by_hand, write_checkpoint

from llama import Llama, LlamaError
from llama.generation import sample_top_p as reexported
from llama.model import Transformer
from llama.rotary import RopeScaling
from llama.sampling import sample_top_p
from llama.tokenization.hf_tokenizer import open_tokenizer

FORMS: dict[str, dict] = {
    "packed": {},
    "recorded": {"compile": True},
    "compiled": {"compile": True},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
form: dict = {}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A checkpoint with heads that attention's kernel takes, whose steps are recorded on a CPU; and one with others."""
    shapes = {True: replace(ARGS, n_heads=4, n_kv_heads=2), False: ARGS}
    return {whole: write_checkpoint(tmp_path_factory.mktemp("tiny"), args) for whole, args in shapes.items()}


@pytest.fixture
def tiny_dir(directories: dict[bool, Path], every_form: str) -> Path:
    return directories[every_form == "recorded"]


@pytest.fixture(params=FORMS, autouse=True)
def every_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs with each form of the model."""
    monkeypatch.setattr(sys.modules[__name__], "form", FORMS[request.param])
    return request.param


def build(directory: Path, seed: int = 1, **options: object) -> Llama:
    model = kept_model(directory, json.dumps({**form, **options}))
    return Llama(model, open_tokenizer(directory / "tokenizer.model"), seed=seed)


@cache
def kept_model(directory: Path, options: str) -> Transformer:
    """Each form is made once, since compiling takes seconds."""
    given = {"max_seq_len": 96, "device": "cpu", "dtype": "float32", **json.loads(options)}
    return Llama.build(directory, **given).model


def tolerance() -> float:
    """How much logprobs may differ. Where activations are rounded, a last bit may become a whole step of theirs."""
    return 0.05 if "quantization" in form else 1e-4


@torch.no_grad()
def full_forward(llama: Llama, tokens: list[int]) -> torch.Tensor:
    """Logprobs of the whole vocabulary after each token, computed without a cache."""
    return torch.log_softmax(llama.model(torch.tensor([tokens]))[0], -1)


@pytest.fixture
def llama(tiny_dir: Path) -> Llama:
    return build(tiny_dir)


def ids(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=True, eos=False)


def test_greedy_equals_full_forwards(llama: Llama) -> None:
    prompts = [ids(llama, p) for p in PROMPTS]
    tokens, chances = llama.generate(prompts, 20, temperature=0)
    assert chances is None
    assert tokens == [greedy_by_hand(llama, p, 20) for p in prompts]
    assert any(tokens)


# Not where activations are rounded too: there a last bit that differs may become a step of theirs.
@pytest.mark.parametrize("every_form", ["packed", "recorded", "compiled"], indirect=True)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=90), min_size=1, max_size=4),
    max_gen_len=st.one_of(st.none(), st.integers(1, 30)),
    temperature=st.sampled_from([0, 0.6, 1.5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    echo=st.booleans(),
)
def test_batch_equals_single_rows(
    tiny_dir: Path, prompts: list, max_gen_len: int | None, temperature: float, top_p: float, echo: bool
) -> None:
    together = build(tiny_dir).generate(prompts, max_gen_len, temperature, top_p, True, echo)
    alone = build(tiny_dir)
    for i, prompt in enumerate(prompts):
        (tokens,), chances = alone.generate([prompt], max_gen_len, temperature, top_p, True, echo)
        assert together[0][i] == tokens
        assert together[1] is not None and chances is not None
        assert together[1][i] == pytest.approx(chances[0], abs=1e-4)
        assert len(tokens) - len(prompt) * echo <= min(max_gen_len or 96, 96 - len(prompt))


def test_stream_is_generate(tiny_dir: Path) -> None:
    streaming, draining = build(tiny_dir), build(tiny_dir)
    prompts = [ids(streaming, p) for p in PROMPTS]
    rows: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    ended = [None] * len(prompts)
    for steps in streaming.stream(prompts, 30, temperature=1.0):
        assert len({step.row for step in steps}) == len(steps)
        for step in steps:
            assert ended[step.row] is None, "a finished row got another token"
            ended[step.row] = step.finish_reason
            texts[step.row] += step.text
            if step.finish_reason != "stop":
                rows[step.row].append(step.token)
    expected, _ = draining.generate(prompts, 30, temperature=1.0)
    assert rows == expected
    assert texts == [draining.tokenizer.decode(t) for t in expected]
    assert ended == ["length" if len(t) == 30 else "stop" for t in expected]


def test_split_characters_arrive_whole(llama: Llama) -> None:
    """Every byte is a token here, so each character of an echoed prompt is split."""
    steps = next(llama.stream([ids(llama, "é漢🙂")], 1, echo=True))
    assert [s.text for s in steps] == ["<|begin_of_text|>", "", "é", "", "", "漢", "", "", "", "🙂"]


def test_same_seed_same_text_other_seed_other_text(tiny_dir: Path) -> None:
    def texts(seed: int) -> list[str]:
        return [r["generation"] for r in build(tiny_dir, seed=seed).text_completion(PROMPTS, temperature=1.0)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_asking_again_draws_again(llama: Llama) -> None:
    first, second = (llama.text_completion(["hello"], temperature=1.5)[0] for _ in range(2))
    assert first != second
    twins = llama.text_completion(["twin", "twin"], temperature=1.5)
    assert twins[0] != twins[1]


def test_chance_is_the_rows_own_and_global_state_stays(tiny_dir: Path) -> None:
    """A row's text doesn't depend on its neighbours, its place in the batch, or torch's global generator."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    in_order = build(tiny_dir).text_completion(PROMPTS, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    reversed_ = build(tiny_dir).text_completion(PROMPTS[::-1], temperature=1.0)
    assert in_order == reversed_[::-1]


def test_logprobs_are_log_softmax_of_a_full_forward(llama: Llama) -> None:
    prompts = [ids(llama, p) for p in PROMPTS]
    tokens, chances = llama.generate(prompts, 20, temperature=0.8, logprobs=True, echo=True)
    assert chances is not None
    for prompt, row, logprobs in zip(prompts, tokens, chances, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(logprobs)
        full = full_forward(llama, row)
        expected = [full[i - 1, row[i]].item() for i in range(1, len(row))]
        assert logprobs[0] == 0.0
        assert logprobs[1:] == pytest.approx(expected, abs=tolerance())


def test_long_prompts_have_logprobs_too(tiny_dir: Path) -> None:
    """A prompt longer than LOGPROB_CHUNK, the positions whose logits are held at once."""
    llama = build(tiny_dir, max_seq_len=700)
    prompt = [1 + i % 200 for i in range(690)]
    _, chances = llama.generate([prompt, prompt[:300]], 1, logprobs=True, echo=True)
    full = full_forward(llama, prompt)
    expected = [full[i - 1, prompt[i]].item() for i in range(1, len(prompt))]
    assert chances is not None
    assert chances[0][1:690] == pytest.approx(expected, abs=tolerance())
    assert chances[1][1:300] == pytest.approx(expected[:299], abs=tolerance())


def test_output_is_cut_before_the_first_stop_token(tiny_dir: Path) -> None:
    llama = build(tiny_dir)
    prompt = ids(llama, "hello there")
    free, _ = llama.generate([prompt], 20, temperature=0)
    llama.tokenizer.stop_tokens = {free[0][5]}
    cut, _ = llama.generate([prompt], 20, temperature=0)
    assert cut[0] == free[0][: free[0].index(free[0][5])]
    last = list(llama.stream([prompt], 20, temperature=0))[-1][0]
    assert (last.finish_reason, last.token) == ("stop", free[0][5])
    assert last.text in ("", "\ufffd"), "at most what was left of a split character"


def test_finished_rows_cost_nothing(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of a decoding step shrinks to the rows still going, and no prompt is walked token by token."""
    llama = build(tiny_dir, max_batch_size=3)
    shapes = []
    forward = llama.model.hidden_states

    def watch(tokens: torch.Tensor, *where: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *where)

    monkeypatch.setattr(llama.model, "hidden_states", watch)
    llama.tokenizer.stop_tokens = set()
    prompts = [[1] * 90, [2] * 20, [3] * 93]  # 6, 76 and 3 tokens fit
    tokens, _ = llama.generate(prompts, None, temperature=0)
    assert [len(t) for t in tokens] == [6, 76, 3]
    assert sum(rows * length for rows, length in shapes if length > 1) <= 90 + 20 + 93 + 32, "little is padding"
    assert sum(rows for rows, length in shapes if length == 1) == 5 + 75 + 2, "the first tokens are the prompts'"
    llama.tokenizer.stop_tokens = set()
    assert tokens[1] == greedy_by_hand(llama, prompts[1], 76)


def test_a_full_window_leaves_no_room(llama: Llama) -> None:
    full = [7] * 96
    tokens, chances = llama.generate([full, [5]], 3, logprobs=True)
    assert chances is not None
    assert (tokens[0], chances[0]) == ([], [])
    assert tokens[1] == build_tokens(llama, [5])
    echoed, chances = llama.generate([full], 3, logprobs=True, echo=True)
    assert chances is not None
    assert echoed == [full] and len(chances[0]) == 96


def build_tokens(llama: Llama, prompt: list[int]) -> list[int]:
    fresh = Llama(llama.model, llama.tokenizer)
    return fresh.generate([prompt], 3)[0][0]


def test_completions_have_the_contracts_shape(llama: Llama) -> None:
    plain = llama.text_completion(["hello"], max_gen_len=5)[0]
    assert set(plain) - {"stop"} == {"generation", "finish_reason"}
    full = llama.text_completion(["hello"], max_gen_len=5, logprobs=True, echo=True)[0]
    assert full["generation"].startswith("hello")
    assert full["tokens"][:2] == ["<|begin_of_text|>", "h"]
    assert len(full["tokens"]) == len(full["logprobs"])
    chat = llama.chat_completion([[{"role": "user", "content": "hi"}]], max_gen_len=5, logprobs=True)[0]
    assert chat["generation"]["role"] == "assistant"
    assert "".join(chat["tokens"]) == chat["generation"]["content"] or "\ufffd" in "".join(chat["tokens"])
    assert len(chat["tokens"]) == len(chat["logprobs"])


def test_chat_is_generate_on_the_dialogs_prompt(tiny_dir: Path) -> None:
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    llama, other = build(tiny_dir), build(tiny_dir)
    answer = llama.chat_completion([dialog], max_gen_len=9)[0]["generation"]["content"]  # type: ignore[list-item]
    tokens, _ = other.generate([other.formatter.encode_dialog_prompt(dialog)], 9)  # type: ignore[arg-type]
    assert answer == other.tokenizer.decode(tokens[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [""]}, "prompt 0 is empty"),
        ({"prompts": ["a" * 96]}, "prompt 0 has 97 tokens, but max_seq_len is 96"),
        ({"prompts": "abc"}, "prompts is 'abc', expected a list of strings"),
        ({"prompts": ["a", 3]}, "expected a list of strings"),
        ({"prompts": None}, "prompts is None, expected a list of strings"),
        ({"prompts": ["a"], "temperature": -0.1}, "temperature is -0.1"),
        ({"prompts": ["a"], "temperature": float("nan")}, "temperature is nan"),
        ({"prompts": ["a"], "temperature": "hot"}, "temperature is 'hot'"),
        ({"prompts": ["a"], "top_p": 0}, "top_p is 0, expected a number in (0, 1]"),
        ({"prompts": ["a"], "top_p": 1.5}, "top_p is 1.5"),
        ({"prompts": ["a"], "max_gen_len": 0}, "max_gen_len is 0"),
        ({"prompts": ["a"], "max_gen_len": 2.5}, "max_gen_len is 2.5"),
    ],
)
def test_bad_arguments_are_refused_before_any_forward_pass(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    monkeypatch.setattr(llama.model, "hidden_states", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(LlamaError) as error:
        llama.text_completion(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_tokens_and_dialogs_are_refused(llama: Llama) -> None:
    for flat in ([1, 2, 3], torch.tensor([[1, 2]]), None):
        with pytest.raises(LlamaError, match="expected a list of"):
            llama.generate(flat, 3)  # type: ignore[arg-type]
    message = {"role": "user", "content": "hi"}
    with pytest.raises(LlamaError, match=r"list of messages, expected a list of dialogs: put .* into a list"):
        llama.chat_completion([message])  # type: ignore[list-item]
    for dialogs in (None, message, "hi"):
        with pytest.raises(LlamaError, match=r"dialogs is a .*, expected a list"):
            llama.chat_completion(dialogs)  # type: ignore[arg-type]
    for prompt, message in (([512], "token 512"), ([-1], "token -1"), (["a"], "token 'a'"), ([], "prompt 0 is empty")):
        with pytest.raises(LlamaError, match=message):
            llama.generate([prompt], 3)  # type: ignore[list-item]
    for dialogs, message in (
        ([], "no prompt"),
        ([[]], "dialog is empty"),
        ([[{"role": "king", "content": ""}]], "king"),
    ):
        with pytest.raises(LlamaError, match=message):
            llama.chat_completion(dialogs)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_named(llama: Llama) -> None:
    spoiled = copy.deepcopy(llama.model)
    with torch.no_grad():
        spoiled.norm.weight[3] = float("nan")
    llama = Llama(spoiled, llama.tokenizer)
    with pytest.raises(LlamaError, match=r"row 0: the logits at position 6 are not finite in torch.float32"):
        llama.generate([ids(llama, "hello")], 3)


def test_a_newer_call_leaves_an_open_stream(llama: Llama) -> None:
    llama.tokenizer.stop_tokens = set()
    expected = greedy_by_hand(llama, [9, 8, 7], 6), greedy_by_hand(llama, [2] * 60, 4)
    old = llama.stream([[1] * 96, [2] * 60], 4, temperature=0, echo=True)
    next(old)
    new = llama.stream([[9, 8, 7]], 6, temperature=0)
    tokens = [next(new)[0].token]
    older = [step.token for steps in old for step in steps]
    tokens += [step.token for (step,) in new]
    assert (tokens, older) == expected


def test_numpys_integers_are_tokens_and_count(llama: Llama) -> None:
    tokens, _ = llama.generate([list(np.arange(1, 5))], np.int64(3), temperature=0)
    assert tokens == llama.generate([[1, 2, 3, 4]], 3, temperature=0)[0]


def test_an_almost_frozen_temperature_is_the_likeliest_token(llama: Llama) -> None:
    expected, _ = llama.generate([[1, 2, 3]], 9, temperature=0)
    for temperature in (1e-5, 1e-30, 1e-38, 1e-42, 1e-300):
        assert llama.generate([[1, 2, 3]], 9, temperature=temperature)[0] == expected


def test_meta_programs_find_their_names(llama: Llama) -> None:
    assert reexported is sample_top_p
    assert llama.model.params.max_seq_len == 96
    assert llama.formatter.tokenizer is llama.tokenizer
    again = Llama(llama.model, llama.tokenizer)
    assert again.generate([[1, 2]], max_gen_len=3, temperature=0.0, top_p=0.9, logprobs=False, echo=False)[1] is None


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 24}, None])
def test_a_batch_equals_its_rows_where_positions_depend_on_the_length(tmp_path: Path, scaling: dict | None) -> None:
    """Rotary scaling depends on each row's own length, not on the padded batch; and rows exceed a sliding window."""
    args = replace(ARGS, rope_theta=100, rope_scaling=RopeScaling(**scaling) if scaling else None, sliding_window=20)
    llama = build(write_checkpoint(tmp_path, args, endless=True), max_batch_size=4)
    prompts = [[7] * 5, list(range(60)), list(range(30, 50)), list(range(25))]
    together, _ = llama.generate(prompts, 20, temperature=0)
    assert together == [llama.generate([prompt], 20, temperature=0)[0][0] for prompt in prompts]
