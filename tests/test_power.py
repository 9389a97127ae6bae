"""The smallest detectable change: by hand, for any data, and against simulated test splits."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation import metrics, power, statistics
from stages.reporting import verdicts
from tests.experiment import metrics_of
from tests.test_metrics import SETTINGS


def split(images, pairs_each, accuracy, alike, generator):
    """Outcomes of base pairs: of an image all are the same with a chance of ``alike``."""
    own = generator.random((images, pairs_each)) < accuracy
    shared = generator.random((images, 1)) < accuracy
    outcomes = np.where(generator.random((images, 1)) < alike, shared, own)
    return outcomes.astype(float).ravel(), np.repeat(np.arange(images), pairs_each)


def test_a_split_of_800_images_by_hand():
    # c = 1.963 + 0.842, k = c²/800; half: sqrt(k/4/(1+k)).
    found = power.detectable([1.0] * 400 + [0.0] * 400, np.arange(800))
    assert found.win_rate == pytest.approx(0.0493, abs=1e-4)
    assert found.independent_pairs == pytest.approx(800)
    # δ² = k·(¼ + ¼ - δ²) at one half
    k = (2 * found.win_rate) ** 2 / (1 - (2 * found.win_rate) ** 2)
    assert found.accuracy**2 == pytest.approx(k * (0.5 - found.accuracy**2))


def test_four_pairs_of_an_image_that_always_agree_are_one():
    outcomes = np.repeat([1.0, 0.0] * 50, 4)
    assert power.design_effect(outcomes, np.repeat(np.arange(100), 4)) == pytest.approx(4)
    assert power.design_effect(np.ones(400), np.repeat(np.arange(100), 4)) == pytest.approx(4)
    assert power.design_effect(outcomes, np.arange(400)) == pytest.approx(1)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 12)), min_size=2),
    st.sampled_from([0.6, 0.8, 0.95]),
)
def test_more_data_of_the_same_kind_shows_smaller_changes(pairs, chance):
    outcomes, groups = (np.array(column) for column in zip(*pairs, strict=True))
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match="at least two images"):
            power.detectable(outcomes, groups)
        return
    once = power.detectable(outcomes, groups, power=chance)
    assert 0 < once.win_rate < 0.5
    assert 0 <= once.accuracy < 1
    assert 1 <= once.independent_pairs <= len(pairs)
    twice = power.detectable(
        np.tile(outcomes, 2), np.concatenate([groups, groups + 100]), power=chance
    )
    assert twice.win_rate < once.win_rate
    assert twice.accuracy <= once.accuracy
    order = np.random.default_rng(0).permutation(len(pairs))
    assert power.detectable(outcomes[order], groups[order], power=chance).win_rate == pytest.approx(
        once.win_rate
    )


@pytest.mark.parametrize(("images", "each", "alike"), [(300, 1, 0.0), (120, 4, 0.5)])
def test_a_change_of_that_size_is_found_in_four_of_five_simulated_splits(images, each, alike):
    """By the rule of the page: an interval by image that leaves no change out."""
    generator = np.random.default_rng(1)
    base, groups = split(images, each, 0.7, alike, generator)
    size = power.detectable(base, groups)
    found = {"win_rate": 0, "accuracy": 0}
    for trial in range(200):
        wins, _ = split(images, each, 0.5 + size.win_rate, alike, generator)
        before, _ = split(images, each, 0.7, alike, generator)
        after, _ = split(images, each, 0.7 + size.accuracy, alike, generator)
        intervals = statistics.bootstrap_intervals(
            {"win_rate": wins - 0.5, "accuracy": after - before}, groups, seed=trial, resamples=200
        )
        for name, interval in intervals.items():
            found[name] += interval.low > 0
    for name, count in found.items():
        assert count / 200 == pytest.approx(0.8, abs=0.09), name


def test_the_metrics_say_what_the_split_can_show_and_an_unclear_result_repeats_it():
    groups = pd.Series([f"g{i}" for i in range(800)])
    found = metrics.of_split(np.tile([1.0, 0.0], 400), groups, SETTINGS)
    assert found["independent_pairs"] == 800
    assert found["win_rate_detectable"] == pytest.approx(0.0493, abs=1e-4)
    assert metrics.of_split(np.ones(4), pd.Series(["g"] * 4), SETTINGS) == {}

    unclear = {"win_rate": 0.51, "win_rate_low": 0.48, "win_rate_high": 0.54}
    notes = [c.text for c in verdicts.concerns(metrics_of(**unclear, **found))]
    assert any("differs from 50% by 4.9 points" in note for note in notes)
    assert not any("differs from 50%" in c.text for c in verdicts.concerns(metrics_of(**found)))
