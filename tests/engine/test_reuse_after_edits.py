"""What the KV cache holds is reused between calls, and never once the model computes otherwise than before."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ARGS, run_program, write_checkpoint

from llama import Llama, Transformer
from llama.engine.sequence import OutputOptions
from llama.rotary import precompute_freqs_cis

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(params=["fast", "plain"])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> Llama:
    directory = write_checkpoint(tmp_path, ARGS, endless=True)
    llama = Llama.build(directory, device="cpu", dtype="float32", max_seq_len=128, max_batch_size=2)
    if request.param == "fast":
        return llama
    plain = copy.deepcopy(llama.model)
    plain.fast = None
    return Llama(plain, llama.tokenizer)


def ask(llama: Llama, reuses: bool = True) -> tuple[list[int], list[float | None], int]:
    """Tokens and logprobs of an answer, and the tokens of the prompt that were reused."""
    request = llama.engine.submit(
        PROMPT, max_gen_len=4, temperature=0.0, output=OutputOptions(True), prefix_cache=reuses
    )
    steps = list(request)
    return [step.token for step in steps], [step.logprob for step in steps], request.reused


def by_state_dict(model: Transformer) -> Callable[[], object]:
    weight = model.state_dict()["layers.0.attention_norm.weight"]
    return lambda: weight.mul_(1.5)


def by_held_data(model: Transformer) -> Callable[[], object]:
    weight = model.layers[0].attention_norm.weight.data
    return lambda: weight.mul_(1.5)


def by_signs(model: Transformer) -> Callable[[], object]:
    weight = model.norm.weight.data
    return lambda: weight[:2].neg_()


def by_angles(model: Transformer) -> Callable[[], object]:
    angles = precompute_freqs_cis(ARGS.head_size, 128, 77.0)
    return lambda: setattr(model, "freqs_cis", angles)


def by_theta(model: Transformer) -> Callable[[], object]:
    def edit() -> None:
        model.params.rope_theta, model.freqs_cis = 77.0, None

    return edit


def by_method(model: Transformer) -> Callable[[], object]:
    attention = model.layers[0].attention
    weigh = attention.weigh
    return lambda: setattr(attention, "weigh", lambda *args: 2 * weigh(*args))


def test_a_second_request_reuses_what_the_first_one_computed(llama: Llama) -> None:
    first, second = ask(llama), ask(llama)
    assert (first[2], second[2]) == (0, len(PROMPT) - 1)
    assert second[0] == first[0]


@pytest.mark.parametrize("prepare", [by_state_dict, by_held_data, by_signs, by_angles, by_theta, by_method])
def test_an_edited_model_reuses_nothing(llama: Llama, prepare: Callable[[Transformer], Callable[[], object]]) -> None:
    edit = prepare(llama.model)  # so that what is held from before is part of what was read
    ask(llama)
    edit()
    tokens, logprobs, reused = ask(llama)
    assert reused == 0
    expected = ask(llama, reuses=False)
    assert tokens == expected[0] and logprobs == pytest.approx(expected[1], abs=1e-5)


def test_a_hook_whose_state_changes_reuses_nothing(llama: Llama) -> None:
    factor = torch.ones(())
    llama.model.layers[0].register_forward_hook(lambda module, args, output: output * factor)
    ask(llama)
    factor.fill_(3)
    tokens, logprobs, _ = ask(llama)
    expected = ask(llama, reuses=False)
    assert tokens == expected[0] and logprobs == pytest.approx(expected[1], abs=1e-5)


def test_a_long_echo_is_told_while_the_engine_serves(llama: Llama) -> None:
    """More steps than are kept for a caller who takes none."""
    llama = Llama(llama.model, llama.tokenizer)
    prompt = [5 + i % 7 for i in range(100)]
    with llama.engine.serve():
        requests = [
            llama.engine.submit(prompt, max_gen_len=9, temperature=0.0, output=OutputOptions(False, True))
            for _ in range(2)
        ]
        assert [len(list(request)) for request in requests] == [109, 109]
    (alone,) = llama.complete([prompt], 9, 0)
    with llama.engine.serve():
        (served,) = llama.complete([prompt], 9, 0, prompt_logprobs=True)
    assert served.tokens == alone.tokens


def test_a_bias_may_be_any_mapping(llama: Llama) -> None:
    bias = defaultdict(lambda: 0.0, {3: 100.0})
    request = llama.engine.submit(PROMPT, max_gen_len=3, temperature=0.0, logit_bias=bias)
    assert [step.token for step in request] == [3, 3, 3]
    assert type(request.sequence.settings.logit_bias) is dict


def test_requests_go_on_after_a_step_that_could_not_begin(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(llama, reuses=False)[0]
    request = llama.engine.submit(PROMPT, max_gen_len=4, temperature=0.0, prefix_cache=False)

    def fail(_: object) -> bool:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(llama.engine.stepper, "notice_edits", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            next(iter(request))
    assert [step.token for step in request] == expected


@pytest.mark.slow
def test_ranks_decide_together_what_is_reused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, ARGS, endless=True)
    done = run_program("tests/reuse_program.py", str(directory), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2
    for rank in ranks:
        assert all(answer == ranks[0]["answers"][0] for answer in rank["answers"])
        assert "hooked or edited on rank 0 and not on all" in rank["error"]
