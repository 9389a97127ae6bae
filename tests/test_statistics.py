"""Statistics: against cases by hand, against scipy, and what must hold for any data."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.commands import seeds
from stages.evaluation import statistics

SEED = 20261122


def how(confidence=0.95, resamples=10_000, seed=SEED):
    return SimpleNamespace(confidence=confidence, resamples=resamples, seed=seed)


def interval_of(values, groups, **options):
    return statistics.bootstrap_intervals({"values": values}, groups, how(**options))["values"]


def rate(margins):
    return statistics.outcomes(margins).mean()


# rewards, margins and rates


def test_a_policy_equal_to_its_reference_has_margin_exactly_0_and_ties_everywhere():
    logps = np.random.default_rng(0).normal(-50, 20, size=(2, 100)).astype(np.float32)
    chosen, rejected = (statistics.implicit_reward(side, side, beta=0.1) for side in logps)
    assert (statistics.outcomes(chosen - rejected) == 0.5).all()


def test_an_outcome_counts_a_tie_half_and_of_negated_margins_is_the_rest():
    margins = np.array([1e-300, -0.0, 0.0, -2.0, 3.0])
    assert list(statistics.outcomes(margins)) == [1, 0.5, 0.5, 0, 1]
    assert rate(-margins) == 1 - rate(margins)


# the clustered bootstrap


def test_bootstrap_equals_a_plain_loop_that_copies_the_rows_of_drawn_groups():
    generator = np.random.default_rng(1)
    groups = generator.integers(0, 7, 30)
    values = generator.normal(size=30)
    drawn = np.random.Generator(np.random.PCG64(SEED)).integers(0, 7, size=(400, 7))
    means = [np.concatenate([values[groups == g] for g in row]).mean() for row in drawn]
    found = interval_of(values, groups, resamples=400)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found.estimate == pytest.approx(values.mean())
    assert found.groups == 7


def test_bootstrap_does_not_depend_on_row_order_companions_or_chunks(monkeypatch):
    generator = np.random.default_rng(4)
    values, groups = generator.normal(size=(2, 60)), generator.integers(0, 20, 60).astype(str)
    one = interval_of(values[0], groups, resamples=500)
    order = generator.permutation(60)
    columns = {"other": values[1][order], "this": values[0][order]}
    both = statistics.bootstrap_intervals(columns, groups[order], how(resamples=500))
    monkeypatch.setattr(statistics, "_CELLS", 100)
    chunked = interval_of(values[0], groups, resamples=500)
    for other in (both["this"], chunked):
        assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-12)
    assert interval_of(values[0], groups, seed=SEED + 1, resamples=500).low != one.low


def test_clustered_intervals_cover_what_row_intervals_miss():
    # 400 data sets of 50 images with 1 to 9 pairs each, which share most of their difficulty.
    generator = np.random.default_rng(6)
    held = {"image": 0, "row": 0}
    for trial in range(400):
        groups = np.repeat(np.arange(50), generator.integers(1, 10, 50))
        values = generator.normal(size=50)[groups] + 0.5 * generator.normal(size=len(groups))
        for by, labels in (("image", groups), ("row", np.arange(len(values)))):
            found = interval_of(values, labels, seed=trial, resamples=400)
            held[by] += found.low <= 0 <= found.high
    assert 0.90 <= held["image"] / 400 <= 0.98
    assert held["row"] / 400 < 0.75


# Wilson and McNemar


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case):
    from scipy import stats

    wins, n = case
    theirs = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert statistics.wilson_interval(wins, n) == pytest.approx((theirs.low, theirs.high))


def test_a_rates_bounds_are_wilsons_where_the_bootstraps_cannot_be_trusted():
    wide = statistics.Interval(0.9, 0.85, 0.95, groups=30)
    assert statistics.rate_bounds(wide) == (0.85, 0.95)
    few = statistics.Interval(0.9, 0.85, 0.95, groups=29)
    assert statistics.rate_bounds(few) == statistics.wilson_interval(0.9 * 29, 29)
    all_won = statistics.Interval(1.0, 1.0, 1.0, groups=100)
    assert statistics.rate_bounds(all_won, 0.9) == statistics.wilson_interval(100, 100, 0.9)


@pytest.mark.parametrize(
    ("before", "after", "gained", "lost", "p_value"),
    [
        # gained 5, lost 1 of 8: p = 2 · (C(6,0) + C(6,1)) / 2⁶ = 14/64
        ([0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0], 5, 1, 14 / 64),
        # leaving a tie counts, staying in one does not
        ([0.5, 0.5, 1.0], [1.0, 0.5, 0.5], 1, 1, 1.0),
        ([0.5, 1, 0], [0.5, 1, 0], 0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(before, after, gained, lost, p_value):
    found, back = statistics.mcnemar(before, after), statistics.mcnemar(after, before)
    assert (found.gained, found.lost) == (back.lost, back.gained) == (gained, lost)
    assert found.p_value == back.p_value == pytest.approx(p_value)


@pytest.mark.parametrize(
    ("low", "high", "p_value", "expected"),
    [
        (0.51, 0.6, None, "higher"),
        (0.4, 0.49, None, "lower"),
        (0.5, 0.6, None, "unclear"),
        (0.4, 0.6, None, "unclear"),
        (None, None, None, "unclear"),
        (float("nan"), float("nan"), None, "unclear"),
        (0.51, 0.6, 0.049, "higher"),
        (0.51, 0.6, 0.05, "unclear"),
    ],
)
def test_it_takes_the_interval_and_the_test_to_tell(low, high, p_value, expected):
    assert statistics.direction(low, high, p_value, null=0.5) == expected


# length


def test_margins_that_follow_from_length_leave_only_ties():
    """Not what rounding leaves of them."""
    lengths = np.arange(-50, 150) % 7 - 3.0
    assert (statistics.outcomes(statistics.without_length(0.1 * lengths, lengths)) == 0.5).all()


# what a split can detect


def split(images, pairs_each, accuracy, alike, generator):
    """Outcomes of base pairs: of an image all are the same with a chance of ``alike``."""
    own = generator.random((images, pairs_each)) < accuracy
    shared = generator.random((images, 1)) < accuracy
    outcomes = np.where(generator.random((images, 1)) < alike, shared, own)
    return outcomes.astype(float).ravel(), np.repeat(np.arange(images), pairs_each)


def test_a_split_of_800_images_by_hand():
    # c = 1.963 + 0.842, k = c²/800; half: sqrt(k/4/(1+k)).
    win_rate, pairs = statistics.detectable([1.0] * 400 + [0.0] * 400, np.arange(800))
    assert win_rate == pytest.approx(0.0493, abs=1e-4)
    assert pairs == pytest.approx(800)


def test_four_pairs_of_an_image_that_always_agree_are_one():
    outcomes, images = np.repeat([1.0, 0.0] * 50, 4), np.repeat(np.arange(100), 4)
    assert statistics.design_effect(outcomes, images) == pytest.approx(4)
    assert statistics.design_effect(np.ones(400), images) == pytest.approx(4)
    assert statistics.design_effect(outcomes, np.arange(400)) == pytest.approx(1)


# seeds and images


def seeds_of(*tables, groups, resamples=2000, seed=SEED):
    return seeds.seeds_interval(tables, groups, how(resamples=resamples, seed=seed))


def test_two_seeds_and_four_images_by_hand():
    # seeds of 2 and 4 right of 4: means 0.5 and 1, sd 0.5/√2, standard error 0.25
    setting = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    found = seeds_of(setting, groups=list("abcd"), resamples=20_000)
    assert found.estimate == 0.75
    assert found.spreads == pytest.approx([0.5 / np.sqrt(2)])
    assert found.seeds_error == pytest.approx(0.25)
    # by image the seeds' mean is 1, 1, ½, ½: deviations of ¼, standard error ¼/√4
    assert found.images_error == pytest.approx(0.125, rel=0.02)
    assert found.seeds_share == pytest.approx(0.8, abs=0.01)
    better = [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    both = seeds_of(setting, better, groups=list("abcd"))
    assert both.estimate == pytest.approx(11 / 12 - 0.75)
    assert both.seeds_error == pytest.approx(np.sqrt(0.25**2 + (0.25**2 / 3) / 3))
    assert both.low < 0 < both.high


# what is refused: a NaN compares as "not greater", and would pass for a loss

GOOD, NAN = [0.0, 1.0, 0.0], [0.0, float("nan"), 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.implicit_reward(GOOD, NAN, 0.1), "value 1 is nan"),
        (lambda: statistics.implicit_reward(GOOD, GOOD, 0), "beta must be"),
        (lambda: statistics.preference_margin([1.0], [1.0], [0], [1]), "at least one token"),
        (lambda: statistics.preference_margin([1.0, 2], [1.0], [1], [1]), "rejected_logps: of"),
        (lambda: statistics.outcomes([]), "margins: of shape"),
        (lambda: statistics.outcomes(np.zeros((2, 2))), r"margins: .*not \(2, 2\)"),
        (lambda: interval_of(NAN, [0, 1, 2]), "values: value 1 is"),
        (lambda: interval_of([1.0, 0.0], ["a", "a"]), "at least two groups"),
        (lambda: interval_of([1.0, 0.0], ["a"]), r"groups: shape \(1,\), but the columns have 2"),
        (lambda: statistics.wilson_interval(3, 2), "successes"),
        (lambda: statistics.mcnemar([0.3], [1]), "outcomes are 0, 0.5 or 1"),
        (lambda: statistics.detectable([1.0, 0.0], [0, 0]), "at least two images"),
        (lambda: seeds_of([[1.0, 2.0]], groups=[0, 1]), "two seeds"),
        (lambda: seeds_of([[1.0, 2], [1.0, 2]], groups=[0, 0]), "at least two groups"),
    ],
)
def test_what_says_nothing_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
