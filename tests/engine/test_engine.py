"""Requests that come and go beside each other: each has the answer that it has alone, whoever runs the steps."""

import copy
import gc
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARGS, write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError
from llama.engine import rows
from llama.engine.sequence import OutputOptions
from llama.engine.sequence_maker import CallOptions
from llama.generation import Step
from llama.model import Transformer
from llama.session import Session

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 3, "device": "cpu", "dtype": "float32"}
TOKEN_BYTES = 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, their size, float32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS, endless=True)


@pytest.fixture
def llama(directory: Path) -> Llama:
    return Llama.build(directory, **OPTIONS)


def tokens_of(steps: Iterator[list[Step]] | list[list[Step]]) -> list[int]:
    return [step.token for batch in steps for step in batch]


def alone(llama: Llama, prompt: list[int], count: int, **options: Any) -> list[int]:
    return llama.complete([prompt], count, temperature=0, **options)[0].tokens


def prompt_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_streams_drained_in_turn(directory: Path, data: st.DataObject) -> None:
    """Any number of streams of any number of prompts, drained in any order and left at any place."""
    llama = Llama.build(directory, **OPTIONS)
    lengths = st.lists(st.integers(1, 60), min_size=1, max_size=5)
    calls = [[prompt_of(length + 100 * i, length) for length in data.draw(lengths)] for i in range(3)]
    expected = [[alone(llama, prompt, 12) for prompt in prompts] for prompts in calls]
    streams = [llama.stream(prompts, 12, temperature=0) for prompts in calls]
    found: list[list[list[int]]] = [[[] for _ in prompts] for prompts in calls]
    going = [0, 1, 2]
    while going:
        i = data.draw(st.sampled_from(going))
        steps = next(streams[i], None)
        if steps is None or data.draw(st.integers(0, 19)) == 0:
            going.remove(i)
            streams[i].close()  # type: ignore[attr-defined]
        for step in steps or []:
            found[i][step.row].append(step.token)
        if steps is None:
            assert found[i] == expected[i]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(m == t[: len(m)] for m, t in zip(mine, theirs, strict=True))


def test_threads(llama: Llama) -> None:
    """Each thread's answers are those of a Llama that nobody else uses."""
    prompts = [prompt_of(i, 5 + 9 * i) for i in range(6)]
    expected = [alone(llama, prompt, 10) for prompt in prompts]
    found: list[list[list[int]]] = [[] for _ in prompts]

    def ask(i: int) -> None:
        for _ in range(4):
            found[i].append(alone(llama, prompts[i], 10))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[tokens] * 4 for tokens in expected]


def test_a_longer_list_queues(llama: Llama) -> None:
    prompts = [prompt_of(i, 3 + i) for i in range(11)]
    answers = llama.complete(prompts, 7, temperature=0)
    assert [answer.tokens for answer in answers] == [alone(llama, prompt, 7) for prompt in prompts]


def test_a_request_joins_those_that_run(llama: Llama) -> None:
    """A request that comes while another one runs gets its tokens beside it, from the next step on."""
    first, second = (llama.engine.submit(prompt_of(i, 20), temperature=0, max_gen_len=30) for i in range(2))
    steps = iter(first)
    for _ in range(3):
        next(steps)
    passes = watch_passes(llama)
    waiting = threading.Thread(target=lambda: [next(iter(second))])
    waiting.start()
    waiting.join(60)
    list(steps)
    assert passes, "the second one's prompt was read"
    assert tokens_of([[step] for step in second]) == alone(llama, prompt_of(1, 20), 30)[1:]


def watch_passes(llama: Llama) -> list[tuple[int, int]]:
    """The shapes of the tokens of all passes from now on."""
    seen: list[tuple[int, int]] = []
    hidden_states = llama.model.hidden_states

    def watch(tokens: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(tokens.shape))
        return hidden_states(tokens, *rest)

    llama.model.hidden_states = watch  # type: ignore[method-assign]
    return seen


def test_what_nobody_waits_for_is_not_computed(llama: Llama) -> None:
    left = llama.stream([prompt_of(1, 5)], 50, temperature=0)
    next(left)
    passes = watch_passes(llama)
    llama.complete([prompt_of(2, 5)], 4, temperature=0)
    assert all(rows == 1 for rows, _ in passes)


def test_closed_and_forgotten_requests_leave_no_trace(llama: Llama) -> None:
    closed, forgotten = (llama.stream([prompt_of(i, 30)], temperature=0) for i in range(2))
    next(closed)
    next(forgotten)
    closed.close()  # type: ignore[attr-defined]
    del forgotten
    gc.collect()
    alone(llama, prompt_of(5, 5), 2)
    assert not llama.engine.stepper.sequences


def test_slots_are_given_back(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call's prompts and answers have taken is free when it is over, and their memory is the machine's."""
    released: list[int] = []
    release = llama.model.kv_cache.release
    monkeypatch.setattr(
        llama.model.kv_cache, "release", lambda slot, start=0: (released.append(slot), release(slot, start))
    )
    llama.complete([prompt_of(i, 20) for i in range(5)], 5)
    book = llama.engine.stepper.scheduler.book
    assert book.held == 0 and book.free == book.n_slots
    assert len(released) >= 5
    stream = llama.stream([prompt_of(i, 20) for i in range(2)], 50)
    next(stream)
    assert book.held >= 40
    stream.close()  # type: ignore[attr-defined]
    assert book.held == 0


def test_a_stream_that_never_began_computes_nothing(llama: Llama) -> None:
    passes = watch_passes(llama)
    stream = llama.stream([prompt_of(1, 30)], temperature=0)
    del stream
    alone(llama, prompt_of(2, 4), 2)
    assert passes[0] == (1, 4) and all(shape == (1, 1) for shape in passes[1:])


def refuse(tokens: list[int], logits: Tensor) -> Tensor:
    if len(tokens) > 6:
        raise RuntimeError("enough")
    return logits


def test_a_failure_is_its_own(llama: Llama) -> None:
    """A logits processor that raises ends its own row; the others are computed to their end, and told."""
    prompts = [prompt_of(i, 4) for i in range(3)]
    rows_options = [None, {"logits_processor": refuse}, None]
    expected = [alone(llama, prompt, 8) for prompt in prompts]
    with pytest.raises(LlamaError, match="row 1: RuntimeError: enough") as raised:
        llama.complete(prompts, 8, temperature=0, rows=rows_options)
    answers = raised.value.answers
    assert answers is not None and answers[1] is None
    assert [answers[0].tokens, answers[2].tokens] == [expected[0], expected[2]]
    assert isinstance(raised.value.__cause__, RuntimeError)
    found: list[list[int]] = [[], [], []]
    with pytest.raises(LlamaError, match="row 1"):
        for steps in llama.stream(prompts, 8, temperature=0, rows=rows_options):
            for step in steps:
                found[step.row].append(step.token)
    assert [found[0], found[2]] == [expected[0], expected[2]] and found[1] == expected[1][:3]


@pytest.mark.parametrize("use", ["complete", "score", "beams"])
def test_a_call_within_a_step_is_refused(llama: Llama, use: str) -> None:
    """It would wait for itself."""
    calls: dict[str, Any] = {
        "complete": lambda: llama.complete([[1]], 1),
        "score": lambda: llama.score(["a text"]),
        "beams": lambda: llama.complete([[1]], 1, temperature=0, num_beams=2),
    }
    expected = alone(llama, prompt_of(1, 9), 5)
    with pytest.raises(LlamaError, match="made a call to the Llama whose step calls it"):
        llama.complete([prompt_of(1, 9)], 5, logits_processor=lambda tokens, logits: (calls[use](), logits)[1])
    handle = llama.model.layers[0].register_forward_hook(lambda *_: calls[use]())
    with pytest.raises(LlamaError, match="made a call to the Llama whose step calls it"):
        alone(llama, prompt_of(1, 9), 5)
    handle.remove()
    assert alone(llama, prompt_of(1, 9), 5) == expected


def test_several_failures_are_named(llama: Llama) -> None:
    with pytest.raises(LlamaError, match="2 of 3 answers failed: row 0: RuntimeError: enough; row 2: "):
        llama.complete(
            [prompt_of(i, 4) for i in range(3)],
            8,
            rows=[{"logits_processor": refuse}, None] * 1 + [{"logits_processor": refuse}],
        )


def test_an_interrupt_leaves_others_right(llama: Llama) -> None:
    """Ctrl-C in the midst of a step that serves two threads ends the call of one of them."""
    expected = alone(llama, prompt_of(1, 9), 20)
    other = llama.stream([prompt_of(1, 9)], 20, temperature=0)
    found = tokens_of([next(other), next(other)])
    interrupted = llama.stream([prompt_of(2, 9)], 20, temperature=0)
    next(interrupted)
    handle = llama.model.layers[0].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(interrupted)
    handle.remove()
    assert found + tokens_of(list(other)) == expected


def test_an_error_in_a_pass_is_told_and_others_are_computed_anew(llama: Llama) -> None:
    expected = alone(llama, prompt_of(1, 9), 20)
    other = llama.stream([prompt_of(1, 9)], 20, temperature=0)
    found = tokens_of([next(other), next(other)])

    def fail(*_: Any) -> None:
        raise RuntimeError("broken hook")

    handle = llama.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken hook"):
        llama.complete([prompt_of(2, 9)], 5)
    handle.remove()
    assert found + tokens_of(list(other)) == expected


def test_a_common_prompt_is_read_once(llama: Llama) -> None:
    common = prompt_of(1, 60)
    prompts = [[*common, i, i + 1] for i in range(6)]
    expected = [alone(llama, prompt, 5) for prompt in prompts]
    passes = watch_passes(llama)
    assert [answer.tokens for answer in llama.complete(prompts, 5, temperature=0)] == expected
    read = sum(count * length for count, length in passes if length > 1)
    assert read <= 62 + 5 * 2 + 10, passes


def test_only_who_asks_reuses_earlier_calls(llama: Llama) -> None:
    prompt = prompt_of(1, 40)
    expected = alone(llama, prompt, 5)
    passes = watch_passes(llama)
    alone(llama, prompt, 5)
    assert passes[0] == (1, 40), "nothing of an earlier call"
    alone(llama, prompt, 5, prefix_cache=True)
    session = Session(llama)
    assert [step.token for step in session.stream(prompt, 5, temperature=0)] == expected
    assert session.reused == 39
    request = llama.engine.submit(prompt, temperature=0, max_gen_len=5)
    assert [step.token for step in request] == expected and request.reused == 39
    request = llama.engine.submit(prompt, temperature=0, max_gen_len=5, prefix_cache=False)
    assert [step.token for step in request] == expected and request.reused == 0


EDITS = {
    "in place": lambda model: model.layers[0].attention.wq.weight.data.mul_(0.5),
    "load_state_dict": lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
    "hook": lambda model: model.layers[0].register_forward_hook(lambda _, __, output: output * 0.7),
    "train": lambda model: model.train(),
    "replaced": lambda model: setattr(model.layers[1].attention, "forward", lambda x, *_: 0 * x),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("held", [False, True])
def test_nothing_is_reused_after_an_edit(llama: Llama, edit: str, held: bool) -> None:
    prompt = prompt_of(1, 40)
    held_layer = llama.model.layers[0] if held else None
    list(Session(llama).stream(prompt, 5, temperature=0))
    EDITS[edit](llama.model)
    session = Session(llama)
    tokens = [step.token for step in session.stream(prompt, 5, temperature=0)]
    assert session.reused == 0 and tokens == alone(llama, prompt, 5)
    del held_layer


def test_small_budget(directory: Path) -> None:
    """Where all that runs needs more than the cache may hold, the youngest is set back, and has the same text."""
    llama = Llama.build(directory, **OPTIONS)
    prompts = [prompt_of(i, 20) for i in range(5)]
    expected = [llama.complete([prompt], 40, seed=i)[0] for i, prompt in enumerate(prompts)]
    llama = Llama.build(directory, **OPTIONS | {"kv_cache_gb": 100 * TOKEN_BYTES / 1e9})
    answers = llama.complete(prompts, 40, rows=[{"seed": i} for i in range(5)])
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    with pytest.raises(LlamaError, match="prompt 0 has 90 tokens, but the KV cache holds 80 in all: shorten it"):
        Llama.build(directory, **OPTIONS | {"kv_cache_gb": 80 * TOKEN_BYTES / 1e9}).complete([prompt_of(1, 90)], 5)


def test_rows_tells_which_sequence_each_row_is(llama: Llama) -> None:
    prompts = [prompt_of(i, 4 + i) for i in range(3)]
    seen = []

    def look(module: Any, args: Any, output: Tensor) -> None:
        sequences = rows()
        assert len(sequences) == len(output)
        seen.append([s.index for s in sequences])

    handle = llama.model.layers[0].register_forward_hook(look)
    llama.complete(prompts, 4, temperature=0, ordered_rows=True)
    handle.remove()
    assert seen and all(indices == sorted(indices) for indices in seen)
    assert {i for indices in seen for i in indices} == {0, 1, 2}
    assert rows() == (), "no pass runs"


@pytest.mark.parametrize("how", ["hooked", "replaced"])
def test_a_forward_that_is_not_told_of_slots_uses_them(llama: Llama, how: str) -> None:
    """Rows that end at different times, and a stream beside them, read what is their own."""
    prompts = [prompt_of(i, length) for i, length in enumerate((40, 5, 21, 9, 30))]
    options = [{"max_gen_len": count} for count in (3, 12, 7, 20, 5)]
    expected = [answer.tokens for answer in llama.complete(prompts, temperature=0, rows=options)]
    if how == "hooked":
        llama.model.register_forward_hook(lambda module, given, output: output)
    else:
        forward = llama.model.forward
        llama.model.forward = lambda tokens, start_pos: forward(tokens, start_pos)  # type: ignore[method-assign]
    other = llama.stream([prompts[3]], 20, temperature=0)
    found = tokens_of([next(other), next(other)])
    assert [answer.tokens for answer in llama.complete(prompts, temperature=0, rows=options)] == expected
    assert found + tokens_of(list(other)) == expected[3]


def test_calls_inside_and_outside_of_autocast(llama: Llama) -> None:
    """The cache holds other numbers then, and none of them is taken for the others."""
    prompt = prompt_of(1, 30)
    plain = llama.complete([prompt], 8, temperature=0, prefix_cache=True)[0].tokens
    with torch.autocast("cpu", torch.bfloat16):
        llama.complete([prompt], 8, temperature=0, prefix_cache=True)
    assert llama.complete([prompt], 8, temperature=0, prefix_cache=True)[0].tokens == plain


def test_equal_prompts_with_echoed_logprobs_beside_a_longer_prefix(directory: Path) -> None:
    """A copy has the prompt's logprobs of its twin, and so isn't read before it."""
    llama = Llama.build(directory, **{**OPTIONS, "max_batch_size": 2}, prefill_chunk=16)
    common = prompt_of(3, 70)
    prompts = [[*common, 1], prompt_of(4, 5), [*common, 2], [*common, 2]]
    rows: list[Any] = [{"max_gen_len": count} for count in (1, 1, 9, 9)]
    tokens, logprobs = llama.generate(prompts, None, 0, logprobs=True, echo=True, rows=rows)
    assert tokens[2] == tokens[3] and logprobs is not None
    (alone_tokens,), alone_logprobs = llama.generate([prompts[2]], 9, 0, logprobs=True, echo=True)
    assert tokens[2] == alone_tokens and alone_logprobs is not None
    for own in logprobs[2:]:
        assert own == pytest.approx(alone_logprobs[0], abs=1e-4)


def test_a_twin_that_ends_early_leaves_its_copy_to_read_for_itself(llama: Llama) -> None:
    options = CallOptions(OutputOptions(True, True), 2)
    first, second = llama.engine.make_requests([prompt_of(5, 40)], {"temperature": 0, "max_gen_len": 4}, None, options)
    first.cancel()
    steps = list(second)
    assert len(steps) == 44 and all(step.logprob is not None for step in steps)


def test_a_step_that_fails_does_not_echo_twice(llama: Llama) -> None:
    calls = 0

    def fail_once(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("once")

    prompt = prompt_of(6, 8)
    stream = llama.stream([prompt], 6, temperature=0, echo=True)
    other = llama.stream([prompt_of(7, 30)], 6, temperature=0)
    next(other)
    handle = llama.model.layers[1].register_forward_hook(fail_once)
    with pytest.raises(RuntimeError):
        next(stream)
        next(other)
    handle.remove()
    again = llama.stream([prompt], 6, temperature=0, echo=True)
    assert tokens_of(again)[: len(prompt)] == prompt


@pytest.mark.parametrize("edit", ["negate", "rows", "columns", "hook and undo", "eps"])
def test_a_plain_model_is_watched_as_well(directory: Path, edit: str) -> None:
    """Edits that leave its numbers the same as a set, or that are undone before the next request comes."""
    built = Llama.build(directory, **OPTIONS)
    model = Transformer(built.model.params)
    model.load_state_dict(built.model.state_dict())
    llama = Llama(model, built.tokenizer)
    prompt = prompt_of(8, 60)

    def ask(tokens: list[int]) -> tuple[list[int], int]:
        request = llama.engine.submit(tokens, max_gen_len=6, temperature=0)
        return [step.token for step in request], request.reused

    running = iter(llama.engine.submit(prompt, max_gen_len=20, temperature=0))
    next(running)
    weight = model.layers[0].feed_forward.w1.weight.data
    with torch.no_grad():
        if edit == "negate":
            model.layers[0].feed_forward.w1.weight.neg_()
        elif edit in ("rows", "columns"):
            weight.copy_(weight.flip(0 if edit == "rows" else 1).clone())
        elif edit == "eps":
            model.layers[0].attention_norm.eps = 0.5
    if edit == "hook and undo":
        handle = model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
        next(running)
        handle.remove()
    list(running)
    found, reused = ask([*prompt, 7])
    fresh = Llama(model, built.tokenizer)
    expected = [step.token for step in fresh.engine.submit([*prompt, 7], max_gen_len=6, temperature=0)]
    assert found == expected and reused == 0


def test_two_engines_over_one_model_get_on(directory: Path) -> None:
    one = Llama.build(directory, **OPTIONS, prefill_chunk=8)
    other = Llama(one.model, one.tokenizer, prefill_chunk=8)
    prompts = [prompt_of(9, 70), prompt_of(10, 60)]
    expected = [alone(one, prompt, 12) for prompt in prompts]
    streams = [llama.stream([prompt], 12, temperature=0) for llama, prompt in zip((one, other), prompts, strict=True)]
    found: list[list[int]] = [[], []]
    while any(len(tokens) < 12 for tokens in found):
        for stream, tokens in zip(streams, found, strict=True):
            tokens += tokens_of([next(stream, [])])
    assert found == expected


def test_autocast_is_that_of_who_asks(llama: Llama) -> None:
    """And two kinds at the same time are refused."""
    stream = llama.stream([prompt_of(1, 9)], 8, temperature=0)
    next(stream)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(LlamaError, match=r"in and out of torch\.autocast"):
        llama.complete([prompt_of(2, 9)], 4, temperature=0)
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", ["score", "embed"])
def test_a_text_larger_than_the_cache_is_refused(directory: Path, call: str) -> None:
    built = Llama.build(directory, **OPTIONS)
    llama = Llama(built.model, built.tokenizer, cache_tokens=40)
    with pytest.raises(LlamaError, match=r"text 0 has .* tokens, but the KV cache holds 40 in all"):
        getattr(llama, call)(["a" * 60])
    assert alone(llama, [1, 2, 3], 5) == alone(built, [1, 2, 3], 5)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda llama: pickle.loads(pickle.dumps(llama))])
def test_copies(llama: Llama, how: Any) -> None:
    expected = alone(llama, prompt_of(1, 9), 8)
    stream = llama.stream([prompt_of(1, 9)], 8, temperature=0)
    next(stream)
    other = how(llama)
    assert other.engine.model is other.model and alone(other, prompt_of(1, 9), 8) == expected


def test_submit_is_for_one_answer(llama: Llama) -> None:
    with pytest.raises(LlamaError, match="submit has no num_beams: it is for one answer"):
        llama.engine.submit([1, 2], num_beams=3)
    with pytest.raises(LlamaError, match=r"notify is 3, expected a function without arguments, within serve\(\)"):
        llama.engine.submit([1, 2], notify=3)  # type: ignore[arg-type]


def test_logits_that_a_processor_makes_nan_are_told(llama: Llama) -> None:
    with pytest.raises(LlamaError, match="logits_processor, or another setting, has made logits NaN"):
        llama.complete([[1, 2]], 3, logits_processor=lambda tokens, logits: logits * torch.nan)
