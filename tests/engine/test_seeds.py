"""The random numbers of sequences: their own, drawn anew each time, and remembered for a bounded number of prompts."""

import torch

from llama.engine.seeds import REMEMBERED_PROMPTS, SequenceSeeds


def numbers(seeds: SequenceSeeds, prompt: list[int], seed: int | None = None, copy: int = 0) -> list[float]:
    return torch.rand(4, generator=seeds.make_generator(prompt, seed, copy)).tolist()


def test_asking_again_draws_other_numbers() -> None:
    seeds = SequenceSeeds(1)
    first, second, other, third = (numbers(seeds, prompt) for prompt in ([1, 2], [1, 2], [1, 3], [1, 2]))
    assert len({tuple(drawn) for drawn in (first, second, other, third)}) == 4
    again = SequenceSeeds(1)
    assert [numbers(again, [1, 3]), *(numbers(again, [1, 2]) for _ in range(3))] == [other, first, second, third]
    assert numbers(SequenceSeeds(2), [1, 2]) != first


def test_a_seed_of_its_own_draws_the_same_each_time() -> None:
    seeds = SequenceSeeds(1)
    assert numbers(seeds, [1, 2], seed=7) == numbers(seeds, [1, 2], seed=7) == numbers(SequenceSeeds(5), [1, 2], seed=7)
    assert numbers(seeds, [1, 2], seed=7) != numbers(seeds, [1, 2], seed=7, copy=1)
    assert not seeds.times_given


def test_the_most_recent_prompts_are_remembered() -> None:
    seeds = SequenceSeeds(1, capacity=3)
    first = numbers(seeds, [0])
    for token in (1, 2):
        numbers(seeds, [token])
    second = numbers(seeds, [0])  # which makes it the most recent
    for token in (3, 4):
        numbers(seeds, [token])
    assert len(seeds.times_given) == 3
    third = numbers(seeds, [0])
    assert len({tuple(drawn) for drawn in (first, second, third)}) == 3
    assert numbers(seeds, [1]) == numbers(SequenceSeeds(1), [1])  # it was forgotten


def test_memory_is_bounded() -> None:
    seeds = SequenceSeeds(1)
    for token in range(REMEMBERED_PROMPTS + 100):
        seeds.make_generator([token], None, 0)
    assert len(seeds.times_given) == REMEMBERED_PROMPTS == 65_536
    assert numbers(seeds, [99]) == numbers(SequenceSeeds(1), [99])
    drawn = numbers(seeds, [REMEMBERED_PROMPTS])
    assert drawn != numbers(SequenceSeeds(1), [REMEMBERED_PROMPTS])


def test_prompts_are_counted_from_one() -> None:
    seeds = SequenceSeeds(1)
    for prompt in ([1], [2], [1], [1]):
        seeds.make_generator(prompt, None, 0)
    assert list(seeds.times_given.values()) == [1, 3]  # the most recent is last
