"""Statistics: against cases by hand, against scipy, and what must hold for any data."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, bootstrap, linregress

from stages.evaluation import statistics

SEED = 20261122


def numbers(least: int = 1, most: int = 40) -> st.SearchStrategy[NDArray[np.float64]]:
    """Arrays of (n,) floats that are 0 or large enough for a sum to feel them."""
    element = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 3))
    return hnp.arrays(np.float64, st.integers(least, most), elements=element)


def several(columns: int, least: int = 1) -> st.SearchStrategy[NDArray[np.float64]]:
    """Arrays of (columns, n) floats."""
    element = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 3))
    shape = st.integers(least, 40).map(lambda n: (columns, n))
    return hnp.arrays(np.float64, shape, elements=element)


# rewards and margins


def test_reward_and_margin_are_what_paper_and_pencil_say():
    # policy raised chosen by 2 nats and lowered rejected by 3: margin 0.1 · (2 + 3)
    reward = statistics.implicit_reward([-10.0, -20.0], [-12.0, -17.0], beta=0.1)
    assert reward == pytest.approx([0.2, -0.3])
    margin = statistics.reward_margin([-10.0], [-20.0], [-12.0], [-17.0], beta=0.1)
    assert margin == pytest.approx([0.5])
    assert statistics.log_prob_change([-10.0], [-12.0]) == pytest.approx([2.0])


def test_a_policy_equal_to_its_reference_has_margin_exactly_0_and_ties_everywhere():
    logps = np.random.default_rng(0).normal(-50, 20, size=(2, 100)).astype(np.float32)
    margin = statistics.reward_margin(logps[0], logps[1], logps[0], logps[1], beta=0.1)
    assert statistics.win_rate(margin) == statistics.WinRate(rate=0.5, n=100, wins=0, ties=100)


@given(several(4), st.floats(0.01, 10), st.floats(-100, 100))
def test_margin_ignores_what_the_prompt_alone_adds_and_scales_with_beta(logps, beta, shift):
    margin = statistics.reward_margin(logps[0], logps[1], logps[2], logps[3], beta)
    shifted = statistics.reward_margin(logps[0] + shift, logps[1] + shift, logps[2], logps[3], beta)
    assert shifted == pytest.approx(margin, abs=1e-8)
    doubled = statistics.reward_margin(logps[0], logps[1], logps[2], logps[3], 2 * beta)
    assert doubled == pytest.approx(2 * margin)
    swapped = statistics.reward_margin(logps[1], logps[0], logps[3], logps[2], beta)
    assert swapped == pytest.approx(-margin)


def test_the_sum_prefers_the_short_answer_where_the_mean_per_token_does_not():
    # chosen: 10 tokens of -1 nat; rejected: 4 tokens of -2
    by_sum = statistics.preference_margin([-10.0], [-8.0], [1], [1])
    by_mean = statistics.preference_margin([-10.0], [-8.0], [10], [4])
    assert by_sum == pytest.approx([-2.0])
    assert by_mean == pytest.approx([1.0])


# rates


def test_win_rate_counts_a_tie_half_and_reports_it():
    result = statistics.win_rate([1e-300, -0.0, 0.0, -2.0, 3.0])
    assert result == statistics.WinRate(rate=0.6, n=5, wins=2, ties=2)
    assert statistics.win_rate([3.0]) == statistics.WinRate(rate=1.0, n=1, wins=1, ties=0)


@given(numbers())
def test_win_rate_is_the_mean_outcome_and_of_negated_margins_the_rest(margins):
    result = statistics.win_rate(margins)
    assert result.rate == pytest.approx(statistics.outcomes(margins).mean())
    assert statistics.win_rate(-margins).rate == pytest.approx(1 - result.rate)
    assert result.n == len(margins)
    assert statistics.win_rate(7 * margins) == result


# the clustered bootstrap


def test_bootstrap_equals_a_plain_loop_that_copies_the_rows_of_drawn_groups():
    generator = np.random.default_rng(1)
    groups = generator.integers(0, 7, 30)
    values = generator.normal(size=30)
    drawn = np.random.Generator(np.random.PCG64(SEED)).integers(0, 7, size=(400, 7))
    means = [np.concatenate([values[groups == g] for g in row]).mean() for row in drawn]
    found = statistics.bootstrap_interval(values, groups, seed=SEED, resamples=400)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found.estimate == pytest.approx(values.mean())
    assert (found.n, found.groups) == (30, 7)


def test_bootstrap_of_single_rows_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=200)
    ours = statistics.bootstrap_interval(values, np.arange(200), seed=SEED)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_bootstrap_width_by_hand_for_two_groups():
    # two groups with means 0 and 1: a resample is 0 (1/4), ½ (1/2) or 1 (1/4)
    found = statistics.bootstrap_interval([0, 0, 1, 1], ["a", "a", "b", "b"], seed=SEED)
    assert (found.estimate, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = statistics.bootstrap_interval([0, 0, 1, 1], list("aabb"), seed=SEED, level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_does_not_depend_on_row_order_companions_or_chunks(monkeypatch):
    generator = np.random.default_rng(4)
    values, groups = generator.normal(size=(2, 60)), generator.integers(0, 20, 60).astype(str)
    one = statistics.bootstrap_interval(values[0], groups, seed=SEED, resamples=500)
    order = generator.permutation(60)
    both = statistics.bootstrap_intervals(
        {"other": values[1][order], "this": values[0][order]},
        groups[order],
        seed=SEED,
        resamples=500,
    )
    monkeypatch.setattr(statistics, "_CELLS", 100)
    chunked = statistics.bootstrap_interval(values[0], groups, seed=SEED, resamples=500)
    for other in (both["this"], chunked):
        assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-12)
    again = statistics.bootstrap_interval(values[0], groups, seed=SEED + 1, resamples=500)
    assert again.low != one.low


@settings(deadline=None, max_examples=50)
@given(numbers(least=2), st.integers(2, 8), st.floats(-1e6, 1e6), st.floats(0.01, 100))
def test_bootstrap_moves_and_stretches_with_the_values_and_stays_inside_them(
    values, clusters, shift, scale
):
    groups = np.arange(len(values)) % clusters
    kept = statistics.bootstrap_interval(values, groups, seed=SEED, resamples=300)
    moved = statistics.bootstrap_interval(scale * values + shift, groups, seed=SEED, resamples=300)
    expected = tuple(scale * x + shift for x in (kept.estimate, kept.low, kept.high))
    tolerance = 1e-9 * (scale * np.abs(values).max() + abs(shift) + 1)
    assert (moved.estimate, moved.low, moved.high) == pytest.approx(expected, abs=tolerance)
    assert values.min() - tolerance <= kept.low <= kept.high <= values.max() + tolerance


def test_writing_every_pair_of_an_image_twice_buys_no_certainty():
    generator = np.random.default_rng(5)
    values, groups = generator.normal(size=50), np.arange(50)
    once = statistics.bootstrap_interval(values, groups, seed=SEED)
    twice = statistics.bootstrap_interval(np.tile(values, 2), np.tile(groups, 2), seed=SEED)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_all_pairs_equal_gives_an_interval_without_width():
    found = statistics.bootstrap_interval(np.full(10, 0.1), np.arange(10), seed=SEED)
    assert found.low == found.high == pytest.approx(0.1)


def test_clustered_intervals_cover_what_row_intervals_miss():
    # 400 data sets of 50 images with 1 to 9 pairs each, which share most of their difficulty.
    generator = np.random.default_rng(6)
    clustered = rows = 0
    for trial in range(400):
        sizes = generator.integers(1, 10, 50)
        groups = np.repeat(np.arange(50), sizes)
        values = generator.normal(size=50)[groups] + 0.5 * generator.normal(size=len(groups))
        by_image = statistics.bootstrap_interval(values, groups, seed=trial, resamples=400)
        by_row = statistics.bootstrap_interval(
            values, np.arange(len(values)), seed=trial, resamples=400
        )
        clustered += by_image.low <= 0 <= by_image.high
        rows += by_row.low <= 0 <= by_row.high
    assert 0.90 <= clustered / 400 <= 0.98
    assert rows / 400 < 0.75


def test_a_paired_difference_is_known_better_than_its_two_halves():
    generator = np.random.default_rng(7)
    difficulty, groups = generator.normal(size=300), np.arange(300)
    base = difficulty + 0.2 * generator.normal(size=300)
    tuned = difficulty + 0.1 + 0.2 * generator.normal(size=300)
    found = statistics.bootstrap_intervals(
        {"base": base, "tuned": tuned, "change": tuned - base}, groups, seed=SEED
    )
    width = {name: interval.high - interval.low for name, interval in found.items()}
    assert width["change"] < 0.5 * min(width["base"], width["tuned"])
    assert found["change"].low < 0.1 < found["change"].high
    assert found["change"].low > 0
    assert found["tuned"].low < found["base"].high  # each by itself, the two look alike


def test_ten_thousand_resamples_of_two_thousand_pairs_take_under_two_seconds():
    values = np.random.default_rng(8).normal(size=(3, 2000))
    start = time.process_time()
    statistics.bootstrap_intervals(
        dict(zip("abc", values, strict=True)), np.arange(2000), seed=SEED
    )
    assert time.process_time() - start < 2


# Wilson and McNemar


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case):
    wins, n = case
    theirs = binomtest(wins, n).proportion_ci(method="wilson")
    assert statistics.wilson_interval(wins, n) == pytest.approx((theirs.low, theirs.high))


@given(st.integers(1, 100), st.floats(0, 1), st.floats(0.5, 0.99))
def test_wilson_is_symmetric_holds_the_share_and_widens_with_the_level(n, share, level):
    wins = share * n
    low, high = statistics.wilson_interval(wins, n, level)
    assert 0 <= low <= wins / n + 1e-9
    assert wins / n - 1e-9 <= high <= 1
    assert statistics.wilson_interval(n - wins, n, level) == pytest.approx((1 - high, 1 - low))
    wider = statistics.wilson_interval(wins, n, 0.995)
    assert wider[0] <= low + 1e-12
    assert high <= wider[1] + 1e-12


def test_wilson_of_one_pair_is_wide():
    assert statistics.wilson_interval(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)


def test_mcnemar_by_hand():
    # gained 5, lost 1 of 8: p = 2 · (C(6,0) + C(6,1)) / 2⁶ = 14/64
    before = [0, 0, 0, 0, 0, 1, 1, 0]
    after = [1, 1, 1, 1, 1, 0, 1, 0]
    found = statistics.mcnemar(before, after)
    assert (found.gained, found.lost) == (5, 1)
    assert found.p_value == pytest.approx(14 / 64)


def test_mcnemar_counts_leaving_a_tie_and_not_staying_in_one():
    found = statistics.mcnemar([0.5, 0.5, 1.0], [1.0, 0.5, 0.5])
    assert found == statistics.McNemar(gained=1, lost=1, p_value=1.0)
    assert statistics.mcnemar([0.5, 1, 0], [0.5, 1, 0]).p_value == 1.0


@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.5, 1])), min_size=1))
def test_mcnemar_reads_the_same_in_both_directions(pairs):
    before, after = zip(*pairs, strict=True)
    there, back = statistics.mcnemar(before, after), statistics.mcnemar(after, before)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert 0 <= there.p_value <= 1


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


def test_the_longer_answer_wins_half_of_the_time_where_lengths_are_balanced():
    result = statistics.win_rate(np.array([5, 7, 9, 4]) - np.array([7, 5, 9, 4]))
    assert result == statistics.WinRate(rate=0.5, n=4, wins=1, ties=2)


def test_margins_that_follow_from_length_leave_only_ties():
    """Not what rounding leaves of them."""
    lengths = np.arange(-50, 150) % 7 - 3.0
    control = statistics.length_control(0.1 * lengths, lengths)
    assert statistics.win_rate(control.residual) == statistics.WinRate(0.5, 200, 0, 200)
    assert control.explained == pytest.approx(1.0)


def test_a_rates_bounds_are_wilsons_where_the_bootstraps_cannot_be_trusted():
    wide = statistics.Interval(0.9, 0.85, 0.95, n=100, groups=30)
    assert statistics.rate_bounds(wide) == (0.85, 0.95)
    few = statistics.Interval(0.9, 0.85, 0.95, n=100, groups=29)
    assert statistics.rate_bounds(few) == statistics.wilson_interval(0.9 * 29, 29)
    all_won = statistics.Interval(1.0, 1.0, 1.0, n=100, groups=100)
    assert statistics.rate_bounds(all_won, 0.9) == statistics.wilson_interval(100, 100, 0.9)


def test_a_judge_of_length_alone_is_at_chance_once_length_is_taken_out():
    # chosen is longer in most pairs, and the margin is length plus noise
    generator = np.random.default_rng(10)
    lengths = generator.normal(1.0, 1.0, size=4000)
    control = statistics.length_control(2 * lengths + generator.normal(size=4000), lengths)
    assert statistics.win_rate(2 * lengths).rate > 0.8
    assert statistics.win_rate(control.residual).rate == pytest.approx(0.5, abs=0.03)
    assert control.logistic_rate == pytest.approx(0.5, abs=0.03)
    assert control.explained == pytest.approx(0.8, abs=0.03)


def test_a_judge_that_ignores_length_keeps_its_rate():
    generator = np.random.default_rng(11)
    margins, lengths = generator.normal(1.0, 1.0, size=4000), generator.normal(1.0, 1.0, size=4000)
    control, plain = statistics.length_control(margins, lengths), statistics.win_rate(margins)
    assert statistics.win_rate(control.residual).rate == pytest.approx(plain.rate, abs=0.02)
    assert control.logistic_rate == pytest.approx(plain.rate, abs=0.02)
    assert control.explained < 0.01


def test_the_line_is_scipys_and_the_logistic_fit_finds_the_rate_that_made_the_data():
    generator = np.random.default_rng(12)
    lengths = generator.normal(3.0, 5.0, size=20_000)
    wins = generator.random(20_000) < expit(1.0 + 0.2 * lengths)
    margins = np.where(wins, 1.0, -1.0) * generator.exponential(size=20_000)
    control, line = statistics.length_control(margins, lengths), linregress(lengths, margins)
    assert control.residual == pytest.approx(margins - line.slope * lengths)
    assert control.explained == pytest.approx(line.rvalue**2)
    assert control.logistic_rate == pytest.approx(expit(1.0), abs=0.015)


def test_equal_lengths_leave_the_rate_as_it_is_and_a_clean_sweep_stays_finite():
    margins = np.array([1.0, 2.0, -1.0, 4.0])
    control = statistics.length_control(margins, np.zeros(4))
    assert control.explained == 0.0
    assert control.residual == pytest.approx(margins)
    assert control.logistic_rate == pytest.approx(0.75, abs=0.005)
    swept = statistics.length_control(
        np.full(1000, 2.0), np.random.default_rng(0).normal(size=1000)
    )
    assert 0.999 < swept.logistic_rate < 1
    with pytest.raises(ValueError, match="length_differences: all are 3"):
        statistics.length_control(margins, np.full(4, 3.0))


@given(several(2, least=2), st.floats(0.1, 100))
def test_length_control_does_not_depend_on_the_unit_of_length(columns, unit):
    margins, lengths = columns
    lengths = np.append(lengths, [0.0, 1.0])
    margins = np.append(margins, [0.0, 0.0])
    one, other = (statistics.length_control(margins, s * lengths) for s in (1.0, unit))
    assert 0 <= one.explained <= 1
    assert 0 < one.logistic_rate < 1
    assert other.residual == pytest.approx(one.residual, rel=1e-6, abs=1e-6)
    assert other.logistic_rate == pytest.approx(one.logistic_rate, abs=1e-6)


# what is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_by_name_and_place(bad):
    good = [0.0, 1.0, 0.0]
    broken = [0.0, bad, 1.0]
    with pytest.raises(ValueError, match="reference_rejected: value 1 is"):
        statistics.reward_margin(good, good, good, broken, beta=0.1)
    with pytest.raises(ValueError, match="reference_logps: value 1 is"):
        statistics.implicit_reward(good, broken, beta=0.1)
    with pytest.raises(ValueError, match=r"^chosen_tokens: value 1 is"):
        statistics.preference_margin(good, good, broken, good)
    for call in (statistics.win_rate, statistics.outcomes):
        with pytest.raises(ValueError, match="margins: value 1 is"):
            call(broken)
    with pytest.raises(ValueError, match="change: value 1 is"):
        statistics.bootstrap_intervals({"a": good, "change": broken}, [0, 1, 2], seed=0)
    with pytest.raises(ValueError, match="after: value 1 is"):
        statistics.mcnemar(good, broken)
    with pytest.raises(ValueError, match="length_differences: value 1 is"):
        statistics.length_control(good, broken)
    with pytest.raises(ValueError, match="beta must be"):
        statistics.implicit_reward(good, good, beta=bad)


def test_no_values_unequal_numbers_and_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="margins: there are no values"):
        statistics.win_rate([])
    with pytest.raises(ValueError, match="rejected_logps: 1 values, but chosen_logps has 2"):
        statistics.preference_margin([1.0, 2.0], [1.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match=r"margins: .*not \(2, 2\)"):
        statistics.win_rate(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="tokens: an answer has at least one token, value 0 is 0"):
        statistics.per_token([1.0], [0])
    with pytest.raises(ValueError, match="columns: none"):
        statistics.bootstrap_intervals({}, [], seed=0)


def test_an_interval_from_one_group_is_refused_because_nothing_says_how_groups_differ():
    with pytest.raises(ValueError, match="at least two groups"):
        statistics.bootstrap_interval([1.0, 0.0], ["a", "a"], seed=0)
    with pytest.raises(ValueError, match="at least two groups"):
        statistics.bootstrap_interval([1.0], ["a"], seed=0)
    with pytest.raises(ValueError, match=r"groups: shape \(1,\), but the columns have 2"):
        statistics.bootstrap_interval([1.0, 0.0], ["a"], seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.implicit_reward([1.0], [1.0], beta=0), "beta"),
        (lambda: statistics.bootstrap_interval([1, 2], [1, 2], seed=0, level=1), "level"),
        (lambda: statistics.bootstrap_interval([1, 2], [1, 2], seed=0, resamples=0), "resamples"),
        (lambda: statistics.wilson_interval(0, 0), "n must be"),
        (lambda: statistics.wilson_interval(3, 2), "successes"),
        (lambda: statistics.wilson_interval(float("nan"), 2), "successes"),
        (lambda: statistics.wilson_interval(1, 2, level=0), "level"),
        (lambda: statistics.mcnemar([0.3], [1]), "before: outcomes"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# seeds and images


def test_two_seeds_and_four_images_by_hand():
    # seeds of 2 and 4 right of 4: means 0.5 and 1, sd 0.5/√2, standard error 0.25
    setting = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    found = statistics.seeds_interval([setting], ["a", "b", "c", "d"], seed=SEED, resamples=20_000)
    assert found.estimate == 0.75
    assert found.spreads == pytest.approx([0.5 / np.sqrt(2)])
    assert found.seeds_error == pytest.approx(0.25)
    # by image the seeds' mean is 1, 1, ½, ½: deviations of ¼, standard error ¼/√4
    assert found.images_error == pytest.approx(0.125, rel=0.02)
    assert found.seeds_share == pytest.approx(0.8, abs=0.01)
    better = [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    both = statistics.seeds_interval([setting, better], list("abcd"), seed=SEED, resamples=2000)
    assert both.estimate == pytest.approx(11 / 12 - 0.75)
    assert both.seeds_error == pytest.approx(np.sqrt(0.25**2 + (0.25**2 / 3) / 3))
    assert both.low < 0 < both.high


@settings(max_examples=30, deadline=None)
@given(several(5, least=2), st.floats(-50, 50))
def test_settings_exchanged_turn_the_difference_and_a_constant_moves_a_mean_alone(rows, constant):
    first, second, groups = rows[:2], rows[2:], np.arange(rows.shape[1])

    def interval(*tables):
        return statistics.seeds_interval(tables, groups, seed=SEED, resamples=50)

    there, back = interval(first, second), interval(second, first)
    assert back.estimate == pytest.approx(-there.estimate)
    assert back.seeds_error == pytest.approx(there.seeds_error)
    assert there.low <= there.high
    plain, moved = interval(first), interval(first + constant)
    assert moved.estimate == pytest.approx(plain.estimate + constant, abs=1e-6)
    assert moved.low == pytest.approx(plain.low + constant, abs=1e-6)
    assert moved.seeds_error == pytest.approx(plain.seeds_error, abs=1e-6)


def test_equal_seeds_leave_the_interval_over_images():
    values = np.random.default_rng(SEED).normal(size=200)
    groups = np.arange(200)
    found = statistics.seeds_interval([[values, values]], groups, seed=SEED, resamples=4000)
    plain = statistics.bootstrap_interval(values, groups, seed=SEED, resamples=4000)
    assert found.seeds_error == 0
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_of_three_seeds_hold_the_truth(spread):
    generator = np.random.default_rng(SEED)
    held, bare = 0, 0
    for number in range(200):
        images = generator.normal(size=60)
        tables = [
            images
            + generator.normal(scale=spread, size=(3, 1))
            + generator.normal(scale=0.5, size=(3, 60))
            for _ in range(2)
        ]
        found = statistics.seeds_interval(tables, np.arange(60), seed=number, resamples=200)
        held += found.low <= 0 <= found.high
        difference = tables[1].mean(axis=0) - tables[0].mean(axis=0)
        over_images = statistics.bootstrap_interval(
            difference, np.arange(60), seed=number, resamples=200
        )
        bare += over_images.low <= 0 <= over_images.high
    assert held >= 0.9 * 200
    if spread:  # what an interval over images alone says of a setting is mostly wrong
        assert bare < 0.6 * 200


@pytest.mark.parametrize(
    ("tables", "groups", "message"),
    [
        ([[[1.0, 2.0]]], [0, 1], "fewer than two seeds"),
        ([[[1.0, 2.0], [1.0, 2.0]]], [0, 0], "at least two groups"),
        ([[[1.0, 2.0], [1.0, np.nan]]], [0, 1], "finite"),
        ([[[1.0], [2.0]]], [0, 1], "shape"),
        ([], [0, 1], "one or two"),
    ],
)
def test_seeds_that_say_nothing_are_refused(tables, groups, message):
    with pytest.raises(ValueError, match=message):
        statistics.seeds_interval(tables, groups, seed=0)
