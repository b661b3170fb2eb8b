"""Sampling against a slow nucleus in plain Python integers, chi-square statistics, and torch.log_softmax.

Most rows here are whole numbers over 4096. Sums of those are exact in float32, so the oracle needs no tolerance:
it knows on which side of a boundary a token stands.
"""

import bisect

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.generation import sample_top_p as sample_top_p_of_generation
from llama.sampling import keep_top_p, sample, sample_top_p, token_logprobs
from llama.settings import Settings

UNIT = 4096  # probabilities are whole numbers over this
STEPS = 256  # uniform numbers and p are whole numbers over this
BELOW_ONE = 1 - 2**-24  # the largest float32 that torch.rand gives
# The 0.999 quantile of chi-square, by degrees of freedom (any table): a right sampler fails one seed in a thousand.
CHI_SQUARE_999 = {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}

quick = settings(deadline=None, max_examples=100)


@st.composite
def whole_rows(draw: st.DrawFn, size: int | None = None) -> list[int]:
    """Numbers that sum to UNIT: some of them 0, some equal, in any order."""
    size = size or draw(st.integers(1, 12))
    cuts = sorted(draw(st.lists(st.integers(0, UNIT), min_size=size - 1, max_size=size - 1)))
    row = [b - a for a, b in zip([0, *cuts], [*cuts, UNIT], strict=True)]
    return draw(st.permutations(row))


def nucleus(row: list[int], steps: int) -> list[int]:
    """The tokens that top-p = steps / STEPS keeps, the likeliest first, equal ones by id. Zeros are never kept.

    Where top-p is 1, by id.
    """
    kept, before = [], 0
    for token in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if row[token] and before * STEPS <= steps * UNIT:
            kept.append(token)
        before += row[token]
    return kept if steps < STEPS else sorted(kept)


def quantile(row: list[int], kept: list[int], step: int) -> int:
    """The token of `kept` that holds the number step / STEPS, when its tokens divide [0, 1) by their probabilities."""
    ends = np.cumsum([row[token] for token in kept]).tolist()
    return kept[bisect.bisect_right([end * STEPS for end in ends], step * ends[-1])]


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    expected = counts.sum() * probs
    return float(((counts - expected) ** 2 / expected).sum())


def share(*parts: int) -> Tensor:
    return torch.tensor(parts, dtype=torch.float32) / UNIT


@quick
@given(whole_rows(), st.integers(1, STEPS), st.integers(0, STEPS - 1))
def test_a_draw_is_the_quantile_of_the_renormalised_nucleus(row: list[int], p: int, step: int) -> None:
    uniform = torch.tensor([step / STEPS])
    drawn = sample_top_p(share(*row), p / STEPS, uniform=uniform)
    assert drawn.shape == (1,) and drawn.dtype == torch.int64
    assert drawn.item() == quantile(row, nucleus(row, p), step)
    assert torch.equal(drawn, sample_top_p(share(*row), p / STEPS, uniform=uniform))


@quick
@given(st.data(), st.integers(1, 4), st.integers(1, 9), st.integers(1, STEPS))
def test_rows_of_any_leading_shape_are_drawn_alone(data: st.DataObject, bsz: int, size: int, p: int) -> None:
    rows = data.draw(st.lists(whole_rows(size), min_size=bsz, max_size=bsz))
    steps = data.draw(st.lists(st.integers(0, STEPS - 1), min_size=bsz, max_size=bsz))
    probs = torch.stack([share(*row) for row in rows])  # (B, V)
    uniform = torch.tensor(steps)[:, None] / STEPS  # (B, 1)
    expected = [[quantile(row, nucleus(row, p), step)] for row, step in zip(rows, steps, strict=True)]
    assert sample_top_p(probs, p / STEPS, uniform=uniform).tolist() == expected
    assert sample_top_p(probs[None], p / STEPS, uniform=uniform[None]).tolist() == [expected]
    transposed = probs.T.contiguous().T  # the same numbers, in another order in memory
    assert sample_top_p(transposed, p / STEPS, uniform=uniform).tolist() == expected


@quick
@given(whole_rows(), st.integers(1, STEPS), st.integers(0, 2**32))
def test_draws_of_the_global_generator_stay_in_the_nucleus(row: list[int], p: int, seed: int) -> None:
    probs = share(*row).expand(64, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = sample_top_p(probs, p / STEPS)
        torch.manual_seed(seed)
        again = sample_top_p(probs, p / STEPS)
    assert drawn.shape == (64, 1)
    assert set(drawn.flatten().tolist()) <= set(nucleus(row, p))
    assert torch.equal(drawn, again)


@quick
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.one_of(st.floats(0, BELOW_ONE, width=32), st.sampled_from([0.0, BELOW_ONE])),
)
def test_no_rounding_leads_out_of_the_nucleus_of_a_softmax(logits: list[float], p: float, uniform: float) -> None:
    probs = torch.tensor(logits).softmax(-1)
    token = int(sample_top_p(probs, p, uniform=torch.tensor([uniform])))
    exact = probs.double().numpy()
    assert exact[token] > 0
    assert exact[exact > exact[token]].sum() <= p + len(logits) * 2**-24  # a float32 sum's own error


@quick
@given(whole_rows(), st.integers(0, STEPS - 1))
def test_a_tiny_p_takes_the_likeliest(row: list[int], step: int) -> None:
    for p in (1e-9, 1e-30, 0.0):
        assert int(sample_top_p(share(*row), p, uniform=torch.tensor([step / STEPS]))) == row.index(max(row))


def test_a_token_is_kept_when_the_mass_before_it_is_exactly_p() -> None:
    probs, last = share(2048, 1024, 512, 512), torch.tensor([BELOW_ONE])
    assert int(sample_top_p(probs, 0.5, uniform=last)) == 1
    assert int(sample_top_p(probs, 0.4999, uniform=last)) == 0
    assert int(sample_top_p(probs, 0.75, uniform=last)) == 2


def test_a_number_that_float32_rounds_to_one_draws_the_last_of_the_kept() -> None:
    almost = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(sample_top_p(share(2048, 0, 2048, 0), 1.0, uniform=almost)) == 2
    assert int(sample_top_p(share(1024, 2048, 1024), 0.5, uniform=almost)) == 0


@settings(deadline=None, max_examples=20)
@given(whole_rows())
def test_p_one_reaches_what_has_a_probability_and_nothing_else(row: list[int]) -> None:
    middles = (torch.arange(UNIT)[:, None] + 0.5) / UNIT  # a token of probability n / UNIT holds n of these
    drawn = sample_top_p(share(*row).expand(UNIT, -1), 1.0, uniform=middles).flatten()
    assert torch.bincount(drawn, minlength=len(row)).tolist() == row


@pytest.mark.parametrize("seed", [17, 18, 19])
def test_p_one_drops_no_tail_when_rounding_makes_the_sum_exceed_one(seed: int) -> None:
    """A float32 softmax over many tokens sums to 1 plus some 1e-6: its tail is still part of "everything"."""
    probs = (torch.randn(20000, generator=torch.Generator().manual_seed(seed)) * 4).softmax(-1)
    token = int(sample_top_p(probs, 1.0, uniform=torch.tensor([BELOW_ONE])))
    exact = probs.double()
    assert float(exact[token + 1 :].sum()) <= 4 * 2**-23  # 4 steps of float32 below 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_p_one_reaches_every_token_in_every_dtype(dtype: torch.dtype) -> None:
    """1024 equal tokens: each is exact in each dtype, but the sums up to 1 aren't in those of 16 bits."""
    probs = torch.full((1024,), 1 / 1024, dtype=dtype).expand(1024, -1)
    middles = (torch.arange(1024)[:, None] + 0.5) / 1024
    assert sample_top_p(probs, 1.0, uniform=middles).flatten().tolist() == list(range(1024))


def test_a_large_vocabulary_keeps_the_nucleus_that_float64_keeps(generator: torch.Generator) -> None:
    probs = (torch.randn(128256, generator=generator) * 2).softmax(-1)
    exact = probs.double().numpy()
    order = np.argsort(-exact, kind="stable")
    mass = np.cumsum(exact[order])
    kept = int((mass - exact[order] <= 0.9).sum())
    for uniform in (0.0, 0.25, 0.5, 0.999, BELOW_ONE):
        token = int(sample_top_p(probs, 0.9, uniform=torch.tensor([uniform])))
        rank = int(np.flatnonzero(order == token)[0])
        target = uniform * mass[kept - 1]
        assert mass[rank] - exact[token] - 1e-6 <= target <= mass[rank] + 1e-6
        assert rank < kept


def test_a_numberless_draw_uses_the_global_generator_and_a_numbered_one_leaves_it() -> None:
    probs = share(1024, 1024, 1024, 1024)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        sample_top_p(probs, 0.9, uniform=torch.tensor([0.5]))
        assert torch.equal(torch.get_rng_state(), state)
        sample_top_p(probs, 0.9)
        assert not torch.equal(torch.get_rng_state(), state)
    assert sample_top_p_of_generation is sample_top_p


def test_the_probabilities_are_left_as_they_were() -> None:
    probs = share(1, 4000, 95)
    before = probs.clone()
    sample_top_p(probs, 0.5, uniform=torch.tensor([0.5]))
    assert torch.equal(probs, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_numbers", [True, False])
@pytest.mark.parametrize("steps", [STEPS // 2, 230, STEPS])
def test_frequencies_follow_the_renormalised_nucleus(steps: int, own_numbers: bool, dtype: torch.dtype) -> None:
    row = [96, 1024, 512, 768, 256, 896, 512, 32]
    probs = share(*row).to(dtype).expand(40000, -1)  # exact in bfloat16 too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        uniform = torch.rand(40000, 1) if own_numbers else None
        drawn = sample_top_p(probs, steps / STEPS, uniform=uniform)
    counts = np.bincount(drawn.flatten().numpy(), minlength=len(row))
    kept = nucleus(row, steps)
    assert counts[kept].sum() == 40000
    weights = np.array(row, dtype=np.float64)[kept]
    assert chi_square(counts[kept], weights / weights.sum()) < CHI_SQUARE_999[len(kept) - 1]


def test_the_statistic_would_notice_a_sampler_that_does_not_renormalise_right() -> None:
    """The tests above can fail: the same statistic refuses draws from probabilities that are a tenth off."""
    expected = np.array([0.5, 0.25, 0.15, 0.1])
    wrong = np.random.default_rng(0).choice(4, size=40000, p=[0.48, 0.25, 0.16, 0.11])
    assert chi_square(np.bincount(wrong), expected) > CHI_SQUARE_999[3]


@quick
@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7), min_size=1, max_size=4))
def test_temperature_zero_is_argmax(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    chosen = sample(logits, Settings(temperature=0.0))
    assert chosen.shape == (len(rows),)
    assert chosen.tolist() == np.array(rows, dtype=np.float32).argmax(-1).tolist()
    assert sample(logits, Settings(temperature=0, top_p=0.1), torch.rand(len(rows), 1)).tolist() == chosen.tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_argmax_too(temperature: float) -> None:
    """A logit whose quotient overflows float32 must not make the row NaN."""
    logits = torch.tensor([[1.0, 5.0, 20.0], [3.0, 4.0, -20.0]])
    assert sample(logits, Settings(temperature=temperature), torch.tensor([[0.5], [0.5]])).tolist() == [2, 1]


@quick
@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0.2, 3), st.floats(0.1, 1))
def test_rows_are_sampled_at_their_temperature_without_their_neighbours(
    seed: int, bsz: int, temperature: float, p: float
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((bsz, 11)) * 4).astype(np.float32)
    uniform = random.random((bsz, 1)).astype(np.float32)
    expected = []
    for row, (u,) in zip(logits.astype(np.float64), uniform.astype(np.float64), strict=True):
        probs = np.exp((row - row.max()) / temperature)
        order = np.argsort(-probs, kind="stable") if p < 1 else np.arange(len(probs))
        mass = np.cumsum(probs[order] / probs.sum())
        before = np.concatenate([[0], mass[:-1]])
        assume(np.abs(before - p).min() > 1e-5)  # float32 may see a boundary on either side
        ends = mass[before <= p]
        assume(np.abs(ends - u * ends[-1]).min() > 1e-5)
        expected.append(int(order[np.searchsorted(ends, u * ends[-1], side="right")]))
    given = Settings(temperature=temperature, top_p=p)
    together = sample(torch.tensor(logits), given, torch.tensor(uniform))
    assert together.tolist() == expected
    for b in range(bsz):
        alone = sample(torch.tensor(logits[b : b + 1]), given, torch.tensor(uniform[b : b + 1]))
        assert alone.tolist() == expected[b : b + 1]


@quick
@given(st.integers(0, 2**31), st.sampled_from([(7,), (3, 7), (2, 3, 7)]), st.floats(0.1, 12))
def test_token_logprobs_equal_log_softmax(seed: int, shape: tuple[int, ...], scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=random) * scale
    tokens = torch.randint(shape[-1], shape[:-1], generator=random)
    for given_logits in (logits, logits.bfloat16()):
        got = token_logprobs(given_logits, tokens)
        expected = given_logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        assert got.dtype == torch.float32 and got.shape == shape[:-1]
        assert (got <= 0).all()
        largest = float(given_logits.double().abs().max())
        assert float((got - expected).abs().max()) <= 2**-22 * (1 + largest)  # a few roundings of the largest logit


def test_token_logprobs_of_an_impossible_token_and_of_a_certain_one() -> None:
    logits = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert token_logprobs(logits, torch.tensor(0)).item() == 0
    assert token_logprobs(logits, torch.tensor(1)).item() == -torch.inf


@pytest.mark.parametrize("heads", [(1,), (2, 5), (3,), (7, 11)])
@settings(deadline=None, max_examples=40)
@given(rows=st.lists(whole_rows(12), min_size=1, max_size=4), steps=st.integers(1, STEPS), u=st.integers(0, STEPS - 1))
def test_the_few_likeliest_are_enough(heads: tuple[int, ...], rows: list[list[int]], steps: int, u: int) -> None:
    """Sorting only the likeliest, with equal ones among them, keeps and draws the same as sorting all."""
    probs, uniform = torch.tensor(rows) / UNIT, torch.full((len(rows), 1), u / STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.sampling.HEADS", heads)
        few = sample_top_p(probs, steps / STEPS, uniform=uniform), keep_top_p(probs.log(), steps / STEPS)
        patch.setattr("llama.sampling.HEADS", ())
        every = sample_top_p(probs, steps / STEPS, uniform=uniform), keep_top_p(probs.log(), steps / STEPS)
    assert torch.equal(few[0], every[0]) and torch.equal(few[1], every[1])


def test_only_a_few_of_a_large_vocabulary_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.softmax(torch.randn(2, 100_000, generator=torch.Generator().manual_seed(1)) * 5, -1)
    expected = sample_top_p(probs, 0.9, uniform=torch.tensor([[0.5], [0.99]]))
    sorts, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, **options: sorts.append(x.shape[-1]) or sort(x, **options))
    assert torch.equal(sample_top_p(probs, 0.9, uniform=torch.tensor([[0.5], [0.99]])), expected)
    assert max(sorts) <= 1 << 14


def test_a_draw_at_a_boundary_takes_the_next_token() -> None:
    """The token at quantile u has the interval [mass before it, mass with it)."""
    probs = torch.tensor([[0.25, 0.5, 0.25]])
    for p, quantiles, expected in (
        (0.999, (0.0, 0.499, 0.5, 0.749, 0.75, 0.999), [1, 1, 0, 0, 2, 2]),  # from the likeliest on
        (1.0, (0.0, 0.249, 0.25, 0.749, 0.75, 0.999), [0, 0, 1, 1, 2, 2]),  # by id
    ):
        assert [int(sample_top_p(probs, p, uniform=torch.tensor([[u]]))) for u in quantiles] == expected


def test_logprobs_of_large_logits_are_finite() -> None:
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    expected = torch.log_softmax(logits.double(), -1)[0].float()
    for token in range(3):
        exact = float(expected[token])
        assert float(token_logprobs(logits, torch.tensor([token]))) == pytest.approx(exact, abs=1e-4)  # 1000's rounding
