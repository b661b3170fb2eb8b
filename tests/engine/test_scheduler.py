"""The scheduler of steps: a reference model carries out and checks every plan, over random and known schedules."""

import random
from itertools import chain, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_cache import SimulatedCache, choose_token

from llama.engine.pieces import WORTH_A_PASS, choose_end, choose_pieces
from llama.engine.placement import LEAST_HIT, WORTH_A_COPY
from llama.engine.scheduler import MOST_CUTS
from llama.engine.step_plan import Row, SlotCopy, SlotRelease, StepPlan

PREFIX = [(7 * i) % 50 for i in range(1000)]


def answer(prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    for _ in range(length):
        text.append(choose_token(text))
    return text


def make_cache(n_slots: int = 8, budget: int = 10**6, max_rows: int = 8, chunk: int = 10**6) -> SimulatedCache:
    return SimulatedCache(n_slots, budget, max_rows, chunk)


# --- any schedule -----------------------------------------------------------------------------------------------------

BLOCKS = [[token] * length for token in range(2) for length in (4, 12, 45)]
PROMPTS = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4).map(lambda blocks: [*chain(*blocks)][:90])
REQUESTS = st.tuples(
    PROMPTS,
    st.integers(1, 12),
    st.sampled_from([0, 0, 0, 0, 1, None]),
    st.sampled_from([False] * 5 + [True]),
    st.sampled_from([0, 0, 3]),
)
COMMANDS = st.one_of(
    st.tuples(st.just("add"), st.lists(REQUESTS, min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.integers(1, 5), st.sampled_from([True] * 5 + [False])),
    st.tuples(st.just("step"), st.integers(1, 5), st.just(True)),
    st.tuples(st.just("want"), st.sampled_from([2**12 - 1, 2**12 - 1, 0b11110000, 0b10101010, 0b011011011011, 1])),
    st.tuples(st.just("finish"), st.integers(0, 50)),
    st.tuples(st.just("by_hand"), st.sampled_from([0, 0, 30, 95, 200])),
    st.tuples(st.just("close"), st.integers(0, 1)),
    st.tuples(st.just("forget")),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(COMMANDS, min_size=10, max_size=80),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([105, 150, 300, 1000]),
    st.integers(1, 5),
    st.sampled_from([1, 16, 64, 128]),
    st.sampled_from([102, 1000]),
)
def test_any_schedule(
    commands: list[tuple], n_slots: int, budget: int, max_rows: int, chunk: int, max_seq_len: int
) -> None:
    """Every plan does what it says and what it may, and every answer is the one that a request alone gets."""
    cache = SimulatedCache(n_slots, budget, max_rows, chunk, max_seq_len)
    prompts: list[list[int]] = []
    for command, *arguments in commands:
        keys = [*cache.requests]
        if command == "add":
            for request in arguments[0]:
                cache.add(len(prompts), *request)
                prompts.append(request[0])
        elif command == "step":
            for _ in range(arguments[0]):
                cache.step(arguments[1])
        elif command == "want":
            cache.want({key for key in keys if arguments[0] >> (key % 12) & 1})
        elif command == "finish" and keys:
            cache.finish(keys[arguments[0] % len(keys)])
        elif command == "by_hand":
            cache.scheduler.set_by_hand(arguments[0])
        elif command == "close":
            cache.scheduler.close_scope(arguments[0])
        elif command == "forget":
            cache.forget()
        assert cache.scheduler.running + cache.scheduler.waiting == len(cache.requests)
    cache.scheduler.set_by_hand(0)
    cache.want({*cache.requests})
    cache.run(20_000)
    for key, prompt in enumerate(prompts):
        assert cache.answers[key] == answer(prompt, len(cache.answers[key]) - len(prompt))
    for scope in (0, 1):
        cache.scheduler.close_scope(scope)
    plan = cache.step()
    assert not any(content.tokens for content in cache.slots) and plan.pieces == plan.rows == ()
    assert (cache.book.held, cache.book.free, cache.scheduler.plan()) == (0, n_slots, StepPlan())


def test_ten_thousand_requests() -> None:
    """Requests that come and go for a long time: all are answered, and what they have in common is rarely computed."""
    chance = random.Random(0)
    cache = make_cache(n_slots=24, budget=3000, max_rows=12, chunk=128)
    systems = [[chance.randrange(50) for _ in range(60)] for _ in range(8)]
    prompts, key = dict[int, list[int]](), 0
    while key < 10_000:
        for _ in range(min(chance.choice([0, 0, 1, 4]), 10_000 - key)):
            prompts[key] = chance.choice(systems) + [chance.randrange(50) for _ in range(chance.randrange(1, 30))]
            cache.add(key, prompts[key], chance.randrange(1, 12), scope=chance.choice([0, 0, 0, None]))
            key += 1
        if cache.requests and chance.random() < 0.02:
            cache.finish(chance.choice([*cache.requests]))
        cache.step()
    cache.run()
    lengths = {key: len(text) - len(prompts[key]) for key, text in cache.answers.items()}
    assert all(text == answer(prompts[key], lengths[key]) for key, text in cache.answers.items())
    assert len(cache.answers) == 10_000
    assert cache.computed < 0.6 * sum(len(text) for text in cache.answers.values())


# --- prefixes ---------------------------------------------------------------------------------------------------------


def test_requests_that_arrive_together_compute_their_prefix_once() -> None:
    cache = make_cache(chunk=256)
    for key in range(8):
        cache.add(key, [*PREFIX, 60 + key, 7], answer=2)
    cache.run()
    # Each reads its own end, and decodes one token; what is read beyond the prefix is read by all.
    assert cache.computed == 1002 + 7 * 2 + 8
    assert max(cache.first_steps.values()) <= 5


@pytest.mark.parametrize("ending", ["finish", "want"])
def test_who_waits_for_a_prefix_goes_on_without_the_one_that_read_it(ending: str) -> None:
    cache = make_cache(chunk=256)
    cache.add(0, [60], answer=99)
    cache.step()
    for key in (1, 2, 3):
        cache.add(key, [*PREFIX, 60 + key])
    cache.step()
    assert {*cache.first_steps} == {0, 1}
    if ending == "finish":
        cache.finish(1)
    else:
        cache.want({0, 2, 3})
    plan = cache.step()
    assert [(piece.key, piece.start) for piece in plan.pieces] == [(2, 256)]
    cache.run()
    assert cache.computed == 1002 + 99


@pytest.mark.parametrize(("n_slots", "max_rows", "budget"), [(8, 3, 10**6), (3, 8, 10**6), (8, 8, 2040)])
def test_who_waits_for_a_prefix_keeps_its_place(n_slots: int, max_rows: int, budget: int) -> None:
    """Others are admitted into what rows, slots and room are left beside it, and no further."""
    cache = make_cache(n_slots, budget, max_rows, chunk=300)
    cache.add(0, PREFIX, answer=50)
    cache.add(1, [*PREFIX, 3], answer=50)
    for key in range(2, 6):
        cache.add(key, [60 + key] * 20, answer=50)
    cache.step()
    assert {*cache.first_steps} == {0, 2}
    while 1 not in cache.first_steps:
        cache.step()
    assert {*cache.first_steps} == {0, 1, 2}
    assert cache.scheduler.hit(1) >= 900


def test_a_conversation_goes_on_in_its_slot() -> None:
    cache = make_cache()
    cache.add(0, [1, 2, 3], answer=4)
    cache.run()
    cache.add(1, [*cache.answers[0], 5, 6])
    plan = cache.step()
    assert plan.copies == plan.releases == () and plan.pieces[0].slot == 0
    assert plan.pieces[0].start == 6  # the answer's last token was never fed


@pytest.mark.parametrize(("tail", "is_copied"), [(WORTH_A_COPY, True), (WORTH_A_COPY - 1, False)])
def test_a_prefix_is_copied_where_its_slot_holds_much_more(tail: int, is_copied: bool) -> None:
    cache = make_cache()
    cache.add(0, PREFIX[: 100 + tail])
    cache.run()
    cache.add(1, [*PREFIX[:100], 77])
    plan = cache.step()
    assert plan.copies == ((SlotCopy(0, 1, 100),) if is_copied else ())
    assert plan.releases == (() if is_copied else (SlotRelease(0, 100),))
    assert plan.pieces[0].start == cache.computed - (100 + tail) + 99 == 100


def test_where_there_is_no_slot_for_a_copy_the_rest_is_lost() -> None:
    cache = make_cache(n_slots=1)
    cache.add(0, PREFIX)
    cache.run()
    cache.add(1, [*PREFIX[:100], 77])
    plan = cache.step()
    assert (plan.releases, plan.copies, plan.pieces[0].start) == ((SlotRelease(0, 100),), (), 100)


def test_a_short_prefix_is_not_worth_a_copy() -> None:
    cache = make_cache()
    for key, length in enumerate((LEAST_HIT, LEAST_HIT - 1)):
        cache.add(2 * key, [*[key] * length, *PREFIX[:50]], answer=9)
        cache.step()
        cache.add(2 * key + 1, [*[key] * length, 77], answer=9)
        cache.step()
    assert [cache.scheduler.hit(key) for key in (1, 3)] == [LEAST_HIT, 0]


def test_an_answer_that_is_being_decoded_is_a_prefix() -> None:
    cache = make_cache()
    cache.add(0, PREFIX[:20], answer=50)
    for _ in range(21):
        cache.step()
    text = [*cache.requests[0].tokens]
    cache.add(1, [*text, 77])
    cache.step()
    assert (len(text), cache.scheduler.hit(1) if 1 in cache.requests else 40) == (41, 40)
    assert cache.computed == 20 + 21 + 2


def test_scopes_and_reads_all_share_nothing() -> None:
    cache = make_cache()
    for key, (scope, reads_all) in enumerate([(0, False), (1, False), (None, False), (None, False), (0, True)]):
        cache.add(key, PREFIX, scope=scope, reads_all=reads_all)
        cache.run()
    assert cache.computed == 5 * len(PREFIX)
    cache.add(9, PREFIX)
    cache.run()
    assert cache.computed == 5 * len(PREFIX) + 1


def test_a_scope_ends_with_its_last_request() -> None:
    cache = make_cache(max_rows=1)
    cache.add(0, PREFIX)
    cache.add(1, PREFIX)
    cache.scheduler.close_scope(0)
    cache.run()
    assert cache.computed == len(PREFIX) + 1
    plan = cache.step()
    assert plan.releases == (SlotRelease(0, 0),) and cache.book.free == 8


def test_nothing_is_reused_after_the_weights_changed() -> None:
    cache = make_cache(chunk=600)
    cache.add(0, [*PREFIX, 1], answer=3)
    cache.run()
    cache.add(1, [2, *PREFIX], answer=3)
    cache.step()
    cache.forget()
    cache.add(2, [*PREFIX, 2])
    cache.add(3, [2, *PREFIX, 2])
    cache.step()
    assert cache.scheduler.waiting == 0  # nor does anybody wait for what request 1 is reading
    cache.run()
    assert cache.computed == 1001 + 2 + 1001 + 2 + 1001 + 1002
    assert cache.answers[1] == answer([2, *PREFIX], 3)
    cache.add(4, [2, *PREFIX, 2, 2])
    cache.run()
    assert cache.computed == 1001 + 2 + 1001 + 2 + 1001 + 1002 + 1


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = make_cache(n_slots=3)
    for key in range(3):
        cache.add(key, [60 + key] * 100)
        cache.run()
    cache.add(3, [*[60] * 50, 1], answer=1)  # a use of the first, which stays where it is
    cache.run()
    assert [content.tokens[0] for content in cache.slots] == [60, 60, 62]
    cache.add(4, [63] * 100)
    cache.run()
    assert [content.tokens[0] for content in cache.slots] == [60, 60, 63]


def test_what_is_copied_stays_until_it_is() -> None:
    """Of two requests in one plan, one copies from a slot that the other could have."""
    cache = make_cache(n_slots=2)
    cache.add(0, PREFIX[:200])
    cache.run()
    cache.add(1, [*PREFIX[:150], 77], answer=9)
    cache.add(2, [*PREFIX[:100], 78], answer=9)  # no slot is free: it would cut the first one's
    cache.add(3, [79] * 100, scope=None)
    plan = cache.step()
    assert (plan.releases, plan.copies, len(plan.pieces)) == ((), (SlotCopy(0, 1, 150),), 1)
    assert cache.step().releases == (SlotRelease(0, 100),)
    cache.run()


def test_a_copy_is_found_before_its_request_reads_on() -> None:
    cache = make_cache(budget=3000, chunk=64)
    cache.add(0, PREFIX[:200])
    cache.run()
    cache.add(1, [60] * 1000)
    cache.add(2, [*PREFIX[:100], *[77] * 50])
    plan = cache.step()
    assert plan.copies == (SlotCopy(0, 2, 100),) and [piece.key for piece in plan.pieces] == [1]
    cache.scheduler.set_by_hand(3000 - 1000 - 150)
    assert cache.step().releases == (SlotRelease(0, 0),)
    cache.scheduler.set_by_hand(0)
    cache.add(3, [*PREFIX[:100], *[78] * 50])
    assert cache.step().copies == (SlotCopy(2, 0, 100),)
    cache.run()


# --- turns ------------------------------------------------------------------------------------------------------------


def test_rows_go_on_while_prompts_are_read() -> None:
    cache = make_cache(chunk=64)
    for key in range(4):
        cache.add(key, [key], answer=50)
    cache.step()
    cache.add(4, PREFIX)
    for _ in range(15):
        plan = cache.step()
        assert [row.key for row in plan.rows] == [0, 1, 2, 3]
        assert [piece.end - piece.start for piece in plan.pieces] == [64]


def test_a_long_prompt_does_not_starve_among_short_ones() -> None:
    """It reads a whole chunk at least every few steps, however many short ones arrive."""
    cache = make_cache(n_slots=64, max_rows=64, chunk=100)
    cache.add(0, PREFIX, answer=2)
    for step in range(1, 200):
        cache.add(step, [60], answer=1, scope=None)
        cache.step()
        if 0 not in cache.requests:
            break
    assert step <= 10 * (MOST_CUTS + 1) + 2


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    cache = make_cache(chunk=100)
    cache.add(0, PREFIX)
    cache.step()
    cache.add(1, [60] * 20)
    cache.step()
    assert 1 not in cache.requests and 0 in cache.requests


def test_a_large_request_is_not_passed_over() -> None:
    cache = make_cache(budget=1000)
    cache.add(0, [1] * 500, answer=20)
    cache.step()
    cache.add(1, [2] * 600)
    cache.add(2, [3] * 10)
    while 0 in cache.requests:
        cache.step()
        assert {*cache.first_steps} == {0}
    cache.run()
    assert cache.first_steps[1] == cache.first_steps[2]


def test_the_youngest_is_set_back_and_answers_the_same() -> None:
    cache = make_cache(budget=100)
    for key in range(3):
        cache.add(key, [60 + key] * 30, answer=30)
    set_back = []
    while cache.scheduler.has_work:
        set_back += cache.step().set_back
    assert set_back[:2] == [2, 1] and 0 not in set_back
    for key in range(3):
        assert cache.answers[key] == answer([60 + key] * 30, 30)


def test_who_is_not_wanted_keeps_its_slot_until_room_is_needed() -> None:
    cache = make_cache(n_slots=2)
    cache.add(0, [1] * 50, answer=9)
    cache.step()
    cache.want(set())
    assert cache.step() == StepPlan() and not cache.scheduler.has_work
    cache.add(1, [2] * 50, answer=9)
    assert [piece.key for piece in cache.step().pieces] == [1]
    cache.want({0, 1})
    assert [row.key for row in cache.step().rows] == [0, 1]  # nothing is computed again
    cache.want({1})
    cache.add(2, [3] * 50, answer=9)
    assert cache.step().set_back == (0,)
    cache.want({0, 1, 2})
    cache.run()
    assert cache.answers[0] == answer([1] * 50, 9)


def test_who_is_not_wanted_makes_way_for_a_younger_one() -> None:
    cache = make_cache(budget=100)
    for key in range(3):
        cache.add(key, [60 + key] * 30, answer=9)
    cache.step()
    cache.want({1, 2})
    set_back = [key for _ in range(9) for key in cache.step().set_back]
    assert set_back == [0]


def test_the_oldest_comes_before_those_that_run() -> None:
    """It was set back while nobody wanted it; once it is wanted, the younger one makes way."""
    cache = make_cache(n_slots=1)
    cache.add(0, [1] * 20, answer=9)
    cache.step()
    cache.want(set())
    cache.add(1, [2] * 20, answer=9)
    assert cache.step().set_back == (0,)
    cache.want({0, 1})
    assert cache.step().set_back == (1,)
    cache.run()


def test_calls_by_hand_drop_prefixes_first_and_then_the_youngest() -> None:
    cache = make_cache(budget=100)
    cache.add(0, [1] * 40)
    cache.run()
    for key in (1, 2):
        cache.add(key, [key + 1] * 20, answer=9)
    cache.step()
    cache.scheduler.set_by_hand(50)
    assert cache.step().releases == (SlotRelease(0, 0),)
    cache.scheduler.set_by_hand(70)
    assert cache.step().set_back == (2,)
    cache.scheduler.set_by_hand(100)
    assert cache.step().set_back == (1,)
    assert cache.step() == StepPlan() and cache.scheduler.has_work
    cache.scheduler.set_by_hand(0)
    cache.run()


def test_a_request_may_take_the_whole_budget() -> None:
    cache = make_cache(budget=100)
    cache.add(0, [1] * 100)
    cache.add(1, [2] * 90, answer=11)
    cache.run()
    assert cache.answers[1] == answer([2] * 90, 11)


# --- pieces and rows --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 1000))
def test_pieces_fill_a_pass_with_as_many_as_fit(lengths: list[int], chunk: int) -> None:
    fitting = [n for n in range(2, len(lengths) + 1) if n * choose_end(sorted(lengths[:n])) <= chunk]
    count = max(fitting, default=1)
    width = choose_end(sorted(lengths[:count])) if count > 1 else min(lengths[0], chunk)
    assert choose_pieces(lengths, chunk) == (count, width)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_a_pass_ends_where_padding_costs_more_than_another(lengths: list[int]) -> None:
    lengths = sorted(lengths)
    costs = [sum(other <= length for other in lengths) * (longer - length) for length, longer in pairwise(lengths)]
    dear = [length for length, cost in zip(lengths, costs, strict=False) if cost >= WORTH_A_PASS]
    assert choose_end(lengths) == (dear[0] if dear else lengths[-1])


def test_padding_stays_within_the_cache() -> None:
    cache = SimulatedCache(4, 1000, 4, 64, max_seq_len=100)
    cache.add(0, [1] * 99)
    cache.step()
    cache.add(1, [2] * 50)
    plan = cache.step()  # the first has 35 left: the second, to be padded to as many, would be read beside it
    assert [(piece.key, piece.end - piece.start) for piece in plan.pieces] == [(0, 35)]
    cache.run()


def test_rows_propose_what_there_is_room_for() -> None:
    cache = SimulatedCache(4, 64, 4, 64, max_seq_len=40)
    cache.add(0, [1] * 20, scope=0)
    cache.run()
    cache.add(1, [2] * 34, answer=6, proposals=4)
    cache.step()
    plan = cache.scheduler.plan()
    assert plan.rows == (Row(1, 1, 34, 5),)  # position 39 is the last
    cache.scheduler.extend(1, [5, 5, 5])
    assert cache.scheduler.plan().rows == (Row(1, 1, 37, 3),)
    cache.scheduler.set_by_hand(25)  # 39 are left, which the last token and one proposal take
    plan = cache.scheduler.plan()
    assert plan.rows == (Row(1, 1, 37, 2),) and plan.releases == (SlotRelease(0, 0),)
