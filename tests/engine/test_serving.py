"""An engine that serves: a thread of its own answers all requests, whoever asks, and a failure is its own."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from leading_program import call_differently, edit_and_lead, lead_and_follow, serve_on_ranks, stream_differently
from rank_pool import RankPool
from tiny import ARGS, write_checkpoint

from llama import Llama, LlamaError
from llama.engine.request import Request
from llama.engine.request_checks import check_prompts
from llama.engine.serving import MOST_BUFFERED

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 3, "device": "cpu", "dtype": "float32"}
PROMPTS = [[i, *range(7, 7 + 3 * i)] for i in range(1, 7)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS, endless=True)


@pytest.fixture
def llama(directory: Path) -> Llama:
    return Llama.build(directory, **OPTIONS)


def greedy(llama: Llama, prompt: list[int], count: int = 12) -> list[int]:
    return llama.complete([prompt], count, temperature=0)[0].tokens


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def take_all(request: Request) -> list[int]:
    return [step.token for step in request]


def test_requests_go_on_while_nobody_waits(llama: Llama) -> None:
    expected = [greedy(llama, prompt) for prompt in PROMPTS]
    with llama.engine.serve():
        requests = [llama.engine.submit(prompt, max_gen_len=12, temperature=0) for prompt in PROMPTS]
        wait_until(lambda: all(request.sequence.is_over for request in requests))
        assert [[step.token for step in request.take()] for request in requests] == expected


def test_a_refused_call_leaves_others_alone(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that came while it was checked."""
    requests: list[Request] = []

    def check_slowly(prompts: Any, params: Any) -> None:
        check_prompts(prompts, params)
        if prompts == [[1]]:
            requests.append(llama.engine.submit(PROMPTS[len(requests)], max_gen_len=12, temperature=0))
            raise LlamaError("it is refused")

    expected = [greedy(llama, prompt) for prompt in PROMPTS]
    monkeypatch.setattr("llama.engine.engine.check_prompts", check_slowly)
    with llama.engine.serve():
        for _ in PROMPTS:
            with pytest.raises(LlamaError, match="it is refused"):
                llama.engine.submit([1])
        assert list(map(take_all, requests)) == expected


def test_all_kinds_of_calls_from_threads(llama: Llama) -> None:
    def run_all() -> list[Any]:
        calls: list[Callable[[], Any]] = [
            lambda: llama.text_completion(["hello", "sea"], 0, max_gen_len=9),
            lambda: llama.text_completion(["hello"], 0, max_gen_len=9, num_beams=3)[0]["generation"],
            lambda: [score.tokens for score in llama.score(["a text", "and another one"])],
            lambda: llama.embed(["a text", "more"]).flatten().tolist(),
            lambda: [step.token for steps in llama.stream(PROMPTS[:4], 9, temperature=0) for step in steps if step.row],
            lambda: llama.complete([PROMPTS[0]], 9, temperature=0, lookup_ngram=1)[0].tokens,
        ]
        with ThreadPoolExecutor(len(calls)) as threads:
            found = list(threads.map(lambda call: call(), calls))
        return [sorted(one) if i == 4 else one for i, one in enumerate(found)]

    expected = run_all()
    with llama.engine.serve():
        served = run_all()
    for found in (served, run_all()):
        assert found[:3] + found[4:] == expected[:3] + expected[4:]
        assert found[3] == pytest.approx(expected[3], abs=1e-4)


def test_notify_is_called_for_steps_and_the_end(llama: Llama) -> None:
    called = threading.Semaphore(0)
    with llama.engine.serve():
        request = llama.engine.submit(PROMPTS[0], max_gen_len=5, temperature=0, notify=called.release)
        tokens: list[int] = []
        while not request.is_over:
            assert called.acquire(timeout=60)
            tokens += [step.token for step in request.take()]
    assert tokens == greedy(llama, PROMPTS[0], 5)


def test_nobody_takes_so_it_waits(llama: Llama) -> None:
    """Others go on, and so does it once its steps are taken."""
    expected = greedy(llama, PROMPTS[0], 80)
    with llama.engine.serve():
        slow = llama.engine.submit(PROMPTS[0], max_gen_len=80, temperature=0)
        wait_until(lambda: len(slow.sequence.steps) == MOST_BUFFERED)
        other = take_all(llama.engine.submit(PROMPTS[1], max_gen_len=12, temperature=0))
        assert other == greedy(llama, PROMPTS[1])
        assert len(slow.sequence.steps) == MOST_BUFFERED and not slow.sequence.is_over
        assert take_all(slow) == expected


def test_a_cancelled_request_leaves_nothing(llama: Llama) -> None:
    with llama.engine.serve():
        request = llama.engine.submit(PROMPTS[0], max_gen_len=80, temperature=0, prefix_cache=False)
        wait_until(lambda: bool(request.sequence.steps))
        request.cancel()
        wait_until(lambda: not llama.engine.stepper.sequences)
        assert llama.engine.stepper.scheduler.running == 0
        assert take_all(llama.engine.submit(PROMPTS[1], max_gen_len=12, temperature=0)) == greedy(llama, PROMPTS[1])


def test_a_step_that_fails_fails_its_requests_and_no_later_one(llama: Llama) -> None:
    expected = greedy(llama, PROMPTS[1])
    with llama.engine.serve():

        def fail(*_: Any) -> None:
            raise ValueError("the hook says no")

        handle = llama.model.layers[0].register_forward_hook(fail)
        request = llama.engine.submit(PROMPTS[0], max_gen_len=12, temperature=0)
        with pytest.raises(LlamaError, match="the hook says no"):
            take_all(request)
        handle.remove()
        assert take_all(llama.engine.submit(PROMPTS[1], max_gen_len=12, temperature=0)) == expected


def test_the_thread_outlives_memory_that_is_not_given_back(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another rank is lost: what goes on ends with the reason, and the thread answers what comes later."""
    stepper = llama.engine.stepper
    tidied: list[object] = []

    def fail(commands: object) -> None:
        tidied.append(commands)
        raise RuntimeError("another rank is lost")

    with llama.engine.serve():
        waiting = llama.engine.submit(PROMPTS[0], max_gen_len=90, temperature=0)
        wait_until(lambda: len(waiting.sequence.steps) >= MOST_BUFFERED)
        with monkeypatch.context() as patch:
            patch.setattr(stepper, "tidy", fail)
            assert len(take_all(llama.engine.submit(PROMPTS[1], max_gen_len=3, temperature=0))) == 3
            wait_until(lambda: bool(tidied) and waiting.sequence.is_over)
        with pytest.raises(LlamaError, match="another rank is lost"):
            take_all(waiting)
        expected = take_all(llama.engine.submit(PROMPTS[2], max_gen_len=5, temperature=0))
    assert expected == greedy(llama, PROMPTS[2], 5)


def test_requests_may_be_older_and_younger_than_the_context(llama: Llama) -> None:
    expected = [greedy(llama, prompt) for prompt in PROMPTS[:2]]
    older = llama.engine.submit(PROMPTS[0], max_gen_len=12, temperature=0)
    steps = iter(older)
    first = next(steps).token
    with llama.engine.serve():
        wait_until(lambda: older.sequence.is_over)
        younger = llama.engine.submit(PROMPTS[1], max_gen_len=12, temperature=0)
        with pytest.raises(LlamaError, match="serves already"), llama.engine.serve():
            pass
    assert [first, *(step.token for step in steps)] == expected[0]
    assert take_all(younger) == expected[1]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_a_notify_that_raises_ends_its_own_request(llama: Llama, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with llama.engine.serve():
        request = llama.engine.submit(PROMPTS[0], max_gen_len=12, temperature=0, notify=fail)
        with pytest.raises(LlamaError, match="notify raised"):
            take_all(request)
        assert take_all(llama.engine.submit(PROMPTS[1], max_gen_len=12, temperature=0)) == greedy(llama, PROMPTS[1])


def test_serving_begins_and_ends_while_others_run_steps(llama: Llama) -> None:
    """Threads that stream all the while get what they get alone."""
    expected = [greedy(llama, prompt) for prompt in PROMPTS[:4]]
    ends = threading.Event()

    def ask(i: int) -> list[list[int]]:
        found = []
        while not ends.is_set() or not found:
            found.append(take_all(llama.engine.submit(PROMPTS[i], max_gen_len=12, temperature=0)))
        return found

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask, i) for i in range(4)]
        for _ in range(30):
            with llama.engine.serve():
                time.sleep(0.01)
            time.sleep(0.005)
        ends.set()
        for answer, right in zip(answers, expected, strict=True):
            assert all(found == right for found in answer.result(60))


def test_one_rank_leads_nobody(llama: Llama) -> None:
    with llama.engine.lead():
        assert greedy(llama, PROMPTS[0]) == greedy(llama, PROMPTS[0])
    with pytest.raises(LlamaError, match="the first rank of a group leads"):
        llama.engine.follow()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_follow(pool: RankPool, llama: Llama, directory: Path, ranks: int) -> None:
    """What rank 0 alone asks, of every kind and from threads, is answered as on one rank; so are later calls of all."""
    expected = lead_and_follow(str(directory))
    leader, *others = pool.run(lead_and_follow, str(directory), ranks=ranks).results
    assert leader["tokens"] == expected["tokens"]
    assert leader["embedded"] == pytest.approx(expected["embedded"], abs=1e-4)
    assert "the hook" not in str(leader) and leader["refused"] == expected["refused"]
    assert all(other["after"] == leader["after"] == expected["after"] for other in others)


def test_a_rank_serves(pool: RankPool, directory: Path) -> None:
    expected = serve_on_ranks(str(directory))
    leader, other = pool.run(serve_on_ranks, str(directory), ranks=2).results
    assert leader == expected and other is None


def test_calls_that_differ_between_ranks_are_refused(pool: RankPool, directory: Path) -> None:
    found = pool.run(call_differently, str(directory), ranks=2).results
    assert found[0] == found[1]
    prompts, settings, calls, after = found[0]
    expected = "rank 1 calls text_completion with other prompts than rank 0"
    assert prompts == f"{expected}: all ranks make the same calls in the same order"
    assert "rank 1 calls complete with other settings than rank 0" in settings
    assert "rank 1 calls embed, and on rank 0 score is called" in calls
    assert isinstance(after, str)


def test_streams_on_ranks(pool: RankPool, directory: Path) -> None:
    """What is drained in another order is refused; a stream that rank 0 has left ends, one that rank 1 has left not."""
    found = pool.run(stream_differently, str(directory), ranks=2).results
    assert found[0]["after"] == found[1]["after"] and found[0]["in turn"] == found[1]["in turn"]
    assert "rank 1 waits for answers, and on rank 0 others" in found[0]["other order"] == found[1]["other order"]
    assert "rank 1 calls complete, and on rank 0 answers are waited for" in found[0]["left by 1"]
    assert found[1]["left by 0"] == "ended"
    assert "rank 1 calls complete, and on rank 0 lead or follow is called" in found[0]["led alone"]


def test_edits_on_all_ranks_are_seen_by_those_that_follow(pool: RankPool, directory: Path) -> None:
    (expected,) = [edit_and_lead(str(directory))]
    leader, _ = pool.run(edit_and_lead, str(directory), ranks=2).results
    assert leader == expected
