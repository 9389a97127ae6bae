"""Slices: every pair is in one of each kind, and a small one shows no rate."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation import slices, statistics
from tests.test_metrics import SETTINGS


@pytest.fixture
def scores():
    """60 pairs of 60 images: 40 of colour (30 won), 15 of shape (all won), 5 of unknown kind."""
    n = 60
    return pd.DataFrame(
        {
            "group": [f"g{i}" for i in range(n)],
            "origin": "easy-vqa",
            "kind": ["colour"] * 40 + ["shape"] * 15 + [None] * 5,
            "text": None,
            "image_tokens": [16] * 55 + [20] * 5,
            "in_common": [0.0] * 20 + [0.75] * 40,
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


def test_a_slice_of_few_images_or_all_won_has_wilsons_interval(scores):
    shape = slices.table(scores, SETTINGS).set_index("label").loc["question type: shape"]
    won = slices.table(scores.assign(reward_margin=1.0), SETTINGS).set_index("label")
    for row, images in ((shape, 15), (won.loc["question type: colour"], 40)):
        ends = (row["win_rate_low"], row["win_rate_high"])
        assert ends == pytest.approx(statistics.wilson_interval(images, images), abs=1e-5)


def test_a_slice_with_too_few_pairs_says_so_instead_of_showing_a_rate(scores):
    few = slices.table(scores, SETTINGS).set_index("label").loc["image tokens: 20"]
    assert (few["pairs"], few["note"]) == (5, slices.TOO_FEW)
    assert few[["win_rate", "win_rate_low", "base_accuracy", "tuned_accuracy"]].isna().all()


def test_a_data_set_without_kinds_has_no_slices_of_them(scores):
    table = slices.table(scores.assign(kind=None, origin=None), SETTINGS)
    numbers = {"image tokens", "answer length", "length difference", "words in common"}
    assert set(table["by"]) == numbers


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


def test_a_spreadsheet_computes_nothing_of_what_the_data_call_a_slice(scores):
    table = slices.table(scores.assign(kind="=1+1"), SETTINGS)
    assert "'=1+1" in set(table["slice"])
    assert "=1+1" not in set(table["slice"])
