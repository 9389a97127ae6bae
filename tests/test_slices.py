"""Slices: every pair is in one of each kind, and a small one shows no rate."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation import slices, statistics
from stages.params.params import Evaluate, Generation

SETTINGS = Evaluate(
    confidence=0.95,
    resamples=300,
    seed=0,
    controls=0,
    lm_eval={},
    task_files=Path("tasks"),
    generation=Generation(prompts=0, questions=0, max_new_tokens=8),
)


@pytest.fixture
def scores():
    """60 pairs of 60 images: 40 of colour (30 won), 15 of shape (all won), 5 of unknown kind."""
    n = 60
    return pd.DataFrame(
        {
            "group": [f"g{i}" for i in range(n)],
            "origin": "easy-vqa",
            "kind": ["colour"] * 40 + ["shape"] * 15 + [None] * 5,
            "image_tokens": [16] * 55 + [20] * 5,
            "chosen_tokens": [8] * 30 + [10] * 30,
            "rejected_tokens": [8] * 30 + [10] * 26 + [6] * 4,
            "reward_margin": [1.0] * 30 + [-1.0] * 10 + [0.5] * 20,
            "base_margin": [1.0, -1.0] * 30,
            "tuned_margin": 1.0,
        }
    )


def test_slices_by_hand(scores):
    table = slices.table(scores, SETTINGS).set_index("label")
    colour = table.loc["question type: colour"]
    assert (colour["pairs"], colour["images"], colour["win_rate"]) == (40, 40, 0.75)
    assert colour["win_rate_low"] < 0.75 < colour["win_rate_high"]
    assert (colour["base_accuracy"], colour["tuned_accuracy"]) == (0.5, 1.0)
    everything = table.loc["origin: easy-vqa"]
    assert (everything["pairs"], everything["note"]) == (60, "")


def test_a_middling_slice_has_wilsons_interval(scores):
    shape = slices.table(scores, SETTINGS).set_index("label").loc["question type: shape"]
    low, high = statistics.wilson_interval(15, 15)
    assert (shape["win_rate_low"], shape["win_rate_high"]) == pytest.approx((low, high), abs=1e-5)


def test_where_all_pairs_are_won_the_interval_has_a_width(scores):
    table = slices.table(scores.assign(reward_margin=1.0), SETTINGS).set_index("label")
    colour = table.loc["question type: colour"]
    assert (colour["win_rate"], colour["win_rate_high"]) == (1.0, 1.0)
    assert colour["win_rate_low"] == pytest.approx(statistics.wilson_interval(40, 40)[0], abs=1e-5)


def test_a_slice_with_too_few_pairs_says_so_instead_of_showing_a_rate(scores):
    table = slices.table(scores, SETTINGS).set_index("label")
    few = table.loc["image tokens: 20"]
    assert (few["pairs"], few["note"]) == (5, slices.TOO_FEW)
    for figure in ("win_rate", "win_rate_low", "base_accuracy", "tuned_accuracy"):
        assert pd.isna(few[figure]), figure


def test_a_data_set_without_kinds_has_no_slices_of_them(scores):
    table = slices.table(scores.assign(kind=None, origin=None), SETTINGS)
    assert set(table["by"]) == {"image tokens", "answer length", "length difference"}


def test_numbers_are_cut_into_bins_named_by_what_they_hold(scores):
    table = slices.table(scores, SETTINGS)
    lengths = table[table["by"] == "answer length"]
    # Means of both answers: 8 (30 pairs), 10 (26) and 8 again (the 4 with a short rejected).
    assert list(zip(lengths["slice"], lengths["pairs"], strict=True)) == [("8", 34), ("10", 26)]
    difference = table[table["by"] == "length difference"]
    assert list(difference["slice"]) == ["0", "4"]
    assert list(difference["pairs"]) == [56, 4]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=80))
def test_every_value_is_in_exactly_one_bin_and_equal_ones_share_it(numbers):
    values = np.array(numbers, dtype=float)
    found = list(slices.bins(values))
    assert len(found) <= slices.BINS
    assert (np.sum([mask for _, mask in found], axis=0) == 1).all()
    held = [set(values[mask]) for _, mask in found]
    for i, one in enumerate(held):
        for other in held[i + 1 :]:
            assert max(one) < min(other)
