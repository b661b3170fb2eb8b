"""The serving benchmark: loads by their seed, figures of given moments, loops that give each request its tokens.

No test asserts a speed, which depends on the machine.
"""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import CASES

from llama import Llama, LlamaError
from llama.bench.engine_costs import StageClock, measure_python, measure_reuse
from llama.bench.http_clients import HttpServing
from llama.bench.load import Answer, Arrivals, Range, ServeLoad
from llama.bench.serve_report import LoadRun, Percentiles, ServeFigures, ServeReport, percentile
from llama.bench.serve_runner import ServeConfig, repeat_load, run_serve_benchmark
from llama.bench.serving import ClosedServing, EngineServing, ServingSubject
from llama.bench.subjects import NoText, build_random_model
from llama.cli.bench import open_server
from llama.parallel import Place

SMALL = ["--serve", "--device", "cpu", "--dtype", "float32", "--shape", "demo", "--repeats", "1"]
SMALL_LOAD = ["--requests", "5", "--prompt_range", "3-9", "--gen_range", "2-6"]
Command = Callable[..., tuple[str, str]]


@pytest.fixture
def bench(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python -m llama bench ...` in this process: (standard output, standard error)."""

    def run(*options: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["llama", "bench", *options])
        try:
            runpy.run_module("llama", run_name="__main__")
        except SystemExit as e:
            assert e.code == 1
        return capsys.readouterr()

    return run


@pytest.fixture
def tiny(place: Place) -> Llama:
    """A model whose texts no token stops."""
    return Llama(build_random_model(replace(CASES["grouped"], max_batch_size=3, max_seq_len=64), place), NoText())


LOAD = ServeLoad(9, clients=4, prompt_range=Range(2, 30), gen_range=Range(2, 20))


# --- the load ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_lengths_and_arrivals_and_each_turn_other_tokens() -> None:
    load = replace(LOAD, rate=3.0)
    first = load.make_requests(97)
    assert first == load.make_requests(97)
    again = load.make_requests(97, turn=1)
    assert [(len(a.prompt), a.gen, a.arrival) for a in first] == [(len(a.prompt), a.gen, a.arrival) for a in again]
    assert all(a.prompt != b.prompt for a, b in zip(first, again, strict=True))
    other = replace(load, seed=2).make_requests(97)
    assert [len(a.prompt) for a in first] != [len(a.prompt) for a in other]


def test_lengths_are_in_their_ranges_and_arrivals_at_their_rate() -> None:
    requests = replace(LOAD, requests=2000, rate=5.0).make_requests(97)
    assert {len(r.prompt) for r in requests} == set(range(2, 31)), "both ends are in it"
    assert {r.gen for r in requests} == set(range(2, 21))
    assert all(0 <= token < 97 for r in requests for token in r.prompt)
    arrivals = [r.arrival for r in requests if r.arrival is not None]
    gaps = np.diff([0.0, *arrivals])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.1) and gaps.std() == pytest.approx(1 / 5, rel=0.1), "exponential"
    assert all(r.arrival is None for r in LOAD.make_requests(97))


def test_clients_send_again_once_they_are_answered() -> None:
    arrivals = Arrivals(LOAD, LOAD.make_requests(97))
    assert [number for number, _, _ in arrivals.take(0.0, 0)] == [0, 1, 2, 3]
    assert arrivals.take(1.0, 4) == []
    assert [(number, since) for number, _, since in arrivals.take(2.0, 2)] == [(4, 2.0), (5, 2.0)]
    assert [number for number, _, _ in arrivals.take(3.0, 0)] == [6, 7, 8] and not arrivals


def test_who_arrives_waits_from_then_on_however_many_others_do() -> None:
    load = replace(LOAD, rate=3.0)
    requests = load.make_requests(97)
    moments = [r.arrival for r in requests]
    arrivals = Arrivals(load, requests)
    assert arrivals.next_arrival == moments[0]
    assert arrivals.take(0.0, 0) == []
    assert [(number, since) for number, _, since in arrivals.take(moments[4], 100)] == list(enumerate(moments[:5]))  # type: ignore[arg-type]
    assert arrivals.next_arrival == moments[5]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 2, 3, 20, 101, 250):
        values = rng.exponential(size=size)
        for share in (0.0, 0.5, 0.95, 0.99, 1.0):
            assert percentile(values.tolist(), share) == pytest.approx(np.percentile(values, 100 * share))


def test_figures_of_given_moments() -> None:
    answers = [Answer(0.0, [1.0, 1.5, 4.0]), Answer(2.0, [5.0, 5.0])]
    run = LoadRun.of(answers)
    assert (run.tokens, run.seconds, run.rate) == (5, 5.0, 1.0)
    assert run.first == Percentiles.over([1.0, 3.0]) and run.first.p50 == 2.0
    assert run.between == Percentiles.over([0.5, 2.5, 0.0]) and run.between.p50 == 0.5
    faster = LoadRun(5, 2.5, Percentiles(1.0, 1.0, 1.0), Percentiles(0.25, 0.25, 0.25))
    ratios = ServeFigures.ratios("peer", [faster, run], [run, run])
    assert (ratios.token_rate.max, ratios.token_rate.min) == (2.0, 1.0)
    assert (ratios.first_seconds.p50.min, ratios.between_seconds.p50.min) == (0.5, 0.5)
    own = ServeFigures.of("llama", [run, faster])
    assert (own.token_rate.median, own.first_seconds.p50.median) == (1.5, 1.5)
    at_once = LoadRun(5, 2.5, run.first, Percentiles(0.0, 0.0, 0.0))
    json.dumps(ServeFigures.ratios("peer", [run], [at_once]).between_seconds.p50.median, allow_nan=False)


# --- subjects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 200.0], ids=["closed loop", "open loop"])
@pytest.mark.parametrize("name", ["llama", "closed", "http"])
def test_each_request_gets_its_number_of_tokens_in_order_of_time(tiny: Llama, name: str, rate: float | None) -> None:
    load = replace(LOAD, rate=rate)
    requests = load.make_requests(97)
    http = HttpServing(lambda: open_server(tiny, len(requests)))
    subjects: list[ServingSubject] = [EngineServing(tiny), ClosedServing(tiny, slots=3), http]
    (subject,) = [one for one in subjects if one.name == name]
    answers = subject.serve(load, requests)
    assert subject.name == name
    assert [len(answer.token_seconds) for answer in answers] == [request.gen for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.token_seconds == sorted(answer.token_seconds)
        assert answer.submitted < answer.token_seconds[0]
        assert request.arrival is None or answer.submitted == request.arrival
    if rate is None:
        waiting = [sum(a.submitted <= b.submitted < a.token_seconds[-1] for a in answers) for b in answers]
        assert max(waiting) <= load.clients


def test_a_server_that_fails_ends_the_run_with_its_reason(tiny: Llama) -> None:
    tiny.model.tok_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(
        LlamaError, match=r"the clients of --http ended: .*0 tokens, expected 20; it says .*logits at position"
    ):
        HttpServing(lambda: open_server(tiny, 9)).serve(LOAD, LOAD.make_requests(97))


def test_closed_batches_wait_for_their_last_answer(tiny: Llama) -> None:
    load = replace(LOAD, clients=3)
    answers = ClosedServing(tiny, slots=3).serve(load, load.make_requests(97))
    for batch, following in ((answers[:3], answers[3:6]), (answers[3:6], answers[6:])):
        assert max(a.token_seconds[-1] for a in batch) <= min(a.submitted for a in following)


def test_a_failure_ends_the_run_with_its_reason(tiny: Llama) -> None:
    tiny.model.tok_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(LlamaError, match="logits at position"):
        EngineServing(tiny).serve(LOAD, LOAD.make_requests(97))


def test_subjects_take_turns_with_new_tokens(tiny: Llama) -> None:
    heard: list[tuple[str, list[int]]] = []

    class Subject:
        def __init__(self, name: str):
            self.name = name

        def serve(self, load: ServeLoad, requests: list) -> list[Answer]:
            heard.append((self.name, requests[0].prompt))
            return [Answer(0.0, [1.0, 2.0])] * len(requests)

    runs = repeat_load([Subject("a"), Subject("b")], LOAD, 97, repeats=2)
    assert [name for name, _ in heard] == list("ababab")
    prompts = [prompt for _, prompt in heard]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] != prompts[4]
    assert [len(own) for own in runs] == [2, 2], "the first is a warm-up"


# --- what the engine costs --------------------------------------------------------------------------------------------


def test_the_clock_counts_only_while_it_watches() -> None:
    class Owner:
        def work(self, number: int) -> int:
            return number + 1

    owner, clock = Owner(), StageClock()
    with clock.watch(owner, "work"):
        assert owner.work(1) == 2
    counted = clock.seconds
    assert counted > 0
    owner.work(2)
    assert clock.seconds == counted and "work" not in vars(owner)


def test_the_engines_costs_are_measured(place: Place) -> None:
    llama = Llama(build_random_model(replace(CASES["grouped"], max_batch_size=3, max_seq_len=1100), place), NoText())
    reuse = measure_reuse(llama, 2)
    assert (reuse.prompt, reuse.common) == (1050, 1000)
    assert reuse.first_seconds > 0 and reuse.second_seconds > 0
    assert measure_python(llama, 3) > 0
    assert "hidden_states" not in vars(llama.model)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_report_has_every_field(bench: Command) -> None:
    said, error = bench(*SMALL, *SMALL_LOAD, "--compare", "closed", "--http", "--json", "--slots", "2")
    assert error == ""
    report = json.loads(said)
    assert report.keys() == {field.name for field in fields(ServeReport)}
    assert report["load"]["requests"] == 5 and report["load"]["prompt_range"] == {"least": 3, "most": 9}
    assert (report["model"], report["slots"], report["repeats"]) == ("demo", 2, 1)
    assert [figures["subject"] for figures in report["figures"]] == ["llama", "http", "closed"]
    assert [ratio["subject"] for ratio in report["ratios"]] == ["http", "closed"]
    ratio, (ours, _, closed) = report["ratios"][1], report["figures"]
    assert ratio["token_rate"]["median"] == pytest.approx(ours["token_rate"]["median"] / closed["token_rate"]["median"])
    assert ratio["first_seconds"]["p95"]["median"] == pytest.approx(
        ours["first_seconds"]["p95"]["median"] / closed["first_seconds"]["p95"]["median"]
    )
    assert report["python_seconds"] > 0


def test_the_table_of_a_checkpoint_in_an_open_loop(bench: Command) -> None:
    options = ["--serve", "--ckpt_dir", "demo/model", "--device", "cpu", "--repeats", "1", *SMALL_LOAD, "--rate", "50"]
    said, _ = bench(*options)
    facts, _, table = said.partition("\n\n")
    assert [line.split()[0] for line in facts.splitlines()] == [
        "model",
        "machine",
        "load",
        "figures",
        "reuse",
        "Python",
    ]
    assert "5 requests of 3-9 tokens in and 2-6 out, 50 requests a second, seed 1; 8 slots" in facts
    assert "a second request with 1,000 of 1,050 tokens in common: first token after" in facts
    assert [line.split()[0] for line in table.splitlines()] == ["tokens/s", "llama"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clients", "3"], "--clients was given without --serve: add --serve"),
        (["--rate", "3"], "--rate was given without --serve"),
        (["--http"], "--http was given without --serve: add --serve"),
        (["--prompt_range", "3-4"], "--prompt_range was given without --serve"),
        (["--prefill_chunk", "64"], "--prefill_chunk was given without --serve"),
        (["--serve", "--batch", "3"], "--batch is an option of the benchmark without --serve: take --slots"),
        (["--serve", "--prompt", "3"], "--prompt is an option of the benchmark without --serve: take --prompt_range"),
        (["--serve", "--gen", "3"], "--gen is an option of the benchmark without --serve: take --gen_range"),
        (["--serve", "--ragged"], "--ragged is an option of the benchmark without --serve: leave it out"),
        (["--serve", "--plot", "a.png"], "--plot is an option of the benchmark without --serve: leave it out"),
        (["--serve", "--with", "a.json"], "--with is an option of the benchmark without --serve: leave it out"),
        (["--serve", "--rate", "2", "--clients", "3"], "both --clients and --rate were given"),
        (["--serve", "--rate", "0"], "--rate is 0, expected a number of requests a second above 0"),
        (["--serve", "--requests", "0"], "--requests is 0, expected a whole number of at least 1"),
        (["--serve", "--slots", "-1"], "--slots is -1"),
        (["--serve", "--prompt_range", "0-4"], "--prompt_range is 0, expected a whole number of at least 1"),
        (
            ["--serve", "--prompt_range", "9-4"],
            "--prompt_range is '9-4', expected two whole numbers, the smaller",
        ),
        (["--serve", "--gen_range", "4"], "--gen_range is '4', expected two whole numbers"),
        (["--serve", "--gen_range", "1-4"], "--gen_range is 1-4, expected at least 2"),
        (["--serve", "--compare", "plain"], "--compare has 'plain', expected one or more of closed"),
        (["--serve", "--shape", "70x"], "--shape is '70x', expected one of"),
        (["--compare", "closed"], "--compare has 'closed', expected one or more of transformers"),
        (["--stress", "--serve"], "--serve was given with --stress, which decides that itself"),
        (["--stress", "--ckpt_dir", "a"], "--ckpt_dir was given with --stress, which decides that itself"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_measured(bench: Command, options: list[str], message: str) -> None:
    said, error = bench(*options)
    assert said == ""
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_several_ranks_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServeConfig, "find_place", lambda _: replace(place, world_size=2))
    with pytest.raises(LlamaError, match="--serve runs in one process, and 2 are here: leave out torchrun"):
        run_serve_benchmark(ServeConfig(shape="demo"), open_server)


def test_a_slot_has_room_for_the_longest_request() -> None:
    assert ServeConfig(load=replace(LOAD, prompt_range=Range(1, 2000))).max_seq_len == 2020
    assert ServeConfig(load=LOAD).max_seq_len == 1051
