"""Words follow from the numbers by rules, and claim no more than the intervals do."""

from typing import Any

import pytest

from benchmarks import coverage
from stages.reporting import verdicts
from stages.reporting.page import render
from tests.experiment import POPE, Page, around, inputs_with, metrics_of, slice_table


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.51, 0.6, "better"), (0.4, 0.49, "worse"), (0.4, 0.6, "unclear"), (None, None, "unclear")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, expected):
    values = {"win_rate": 0.5, "win_rate_low": low, "win_rate_high": high}
    assert verdicts.verdict(values, "win_rate") == expected


def test_the_page_claims_no_more_than_the_interval_shows():
    unclear = metrics_of(**around("win_rate", 0.52, 0.05))
    page = Page(render(inputs_with(metrics=unclear))).text
    assert "No clear change of preference. Chosen-versus-rejected win rate 52.0% [47.0" in page


def concerns_of(slices: Any = None, **changed: Any) -> list[tuple[bool, str]]:
    found = verdicts.concerns(metrics_of(**changed), slices)
    return [(kind == "warning", text) for kind, text in found]


def test_good_metrics_raise_no_concern():
    assert concerns_of(slice_table()) == []
    assert "No rule raised a warning." in render(inputs_with())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (around("chosen_logps_change", -2.0, 0.5), "Chosen answers lost probability:"),
        (around("accuracy_change", -0.1, 0.05), "Preference accuracy fell"),
        (around("correct_change", -0.1, 0.05), "Right answers became fewer"),
        (
            {**around(f"{POPE}/change", -0.1, 0.05), f"{POPE}/p_value": 0.001},
            "pope_random got worse: acc",
        ),
        (
            {
                **around(f"{POPE}/change", 0.1, 0.05),
                f"{POPE}/p_value": 0.001,
                f"{POPE}/higher_is_better": 0,
            },
            "pope_random got worse: acc",
        ),
        (around("win_rate_over_blank", 0.1, 0.2), "not clearly higher than with a blank image"),
        (around("win_rate_over_shuffled", 0.1, 0.2), "with another pair's image"),
        (around("win_rate_blank", 0.8, 0.03), "won without looking: with a blank image"),
        (around("repetition_change", 0.05, 0.02), "Answers repeat themselves more"),
        (around("unfinished_change", 0.2, 0.05), "More answers are unfinished"),
    ],
)
def test_what_got_worse_is_named_in_a_warning(changed, expected):
    ((is_warning, text),) = concerns_of(**changed)
    assert is_warning
    assert expected in text


def test_a_slice_that_lost_is_named_on_the_page():
    slices = slice_table()
    slices.loc[1, ["win_rate", "win_rate_low", "win_rate_high"]] = [0.2, 0.1, 0.3]
    ((_, text),) = concerns_of(slices)
    assert "question type = colour" in text
    page = render(inputs_with(slices=slices))
    assert f'<li class="warning"><b>⚠ Warning.</b>{text[:40]}' in page


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (around("base_accuracy", 0.93, 0.02), "little to learn"),
        ({"longer_wins": 0.8}, "preferring the longer answer is right in 80.0%"),
        ({"longer_wins": 0.2}, "preferring the shorter answer is right in 80.0%"),
        ({"longer_wins": 0.6}, None),
        ({"first_words_wins": 0.61}, "first three words is right in 61.0%"),
        ({"bag_of_words_wins": 0.61}, "which words the answers have is right in 61.0%"),
        ({"base_accuracy_blank": 0.61}, "the base with a blank image is right in 61.0%"),
        ({"bag_of_words_wins": 0.6}, None),
        ({"contradictory_pairs": 2}, "contradicts itself: 2 pairs"),
        ({"near_duplicate_images": 3}, "look the same as one of another split: 3."),
        ({"ties": 3}, "3 pairs are tied"),
        ({"seen_text_pairs": 30}, "texts are not: 30 of the 40 test pairs"),
        ({"seen_text_pairs": 20}, None),
        (
            {"off_policy_chosen": 0.6, "off_policy_distance": 1.5},
            "in 60.0% of the pairs the base finds chosen less likely per token than 99% of its own",
        ),
        ({"off_policy_chosen": 0.5, "off_policy_distance": 1.5}, None),
        (around("chosen_logps_change", -0.1, 0.5), "lost probability, not clearly"),
        ({"images": 12}, "Few test images (12)"),
        (
            {**around("win_rate", 0.51, 0.03), "win_rate_detectable": 0.0493},
            "differs from 50% by 4.9 points",
        ),
    ],
)
def test_what_a_reader_should_know_is_a_note(changed, expected):
    found = concerns_of(**changed)
    assert not any(is_warning for is_warning, _ in found)
    assert len(found) == (expected is not None)
    assert all(expected in text for _, text in found)


@pytest.mark.parametrize(
    "changed",
    [
        # 4 lost and none gained: the bootstrap leaves 0 out, McNemar's test does not.
        {**around("correct_change", -0.02, 0.015), "correct_p_value": 0.125},
        {**around("accuracy_change", -0.02, 0.015), "accuracy_p_value": 0.125},
        {**around(f"{POPE}/change", -0.1, 0.05)},  # its p-value is 1
        # Which way is better is not known.
        {
            **around(f"{POPE}/change", -0.1, 0.05),
            f"{POPE}/p_value": 0.001,
            f"{POPE}/higher_is_better": None,
        },
        # Its interval leaves 0 out, but not after it is widened for the number of figures.
        around("repetition_change", 0.05, 0.045),
        # It rose surely, by less than matters.
        around("unfinished_change", 0.04, 0.001),
        # An untrained model ties everywhere: there is no preference that could be for the words.
        {**around("win_rate", 0.5, 0.0), **around("win_rate_over_blank", 0.0, 0.0)},
    ],
)
def test_a_change_that_could_be_chance_is_no_warning(changed):
    assert not any(is_warning for is_warning, _ in concerns_of(**changed))


@pytest.mark.slow
def test_at_most_one_page_of_twenty_warns_where_nothing_changed(monkeypatch):
    monkeypatch.setattr(coverage, "SIMULATIONS", 200)
    by_the_rule, uncorrected = coverage.false_alarms(24, 30)
    assert by_the_rule <= 0.05 + 0.02 < uncorrected  # and the chance of 200 pages


@pytest.mark.slow
def test_the_interval_of_a_setting_that_was_chosen_allows_for_the_choice(monkeypatch):
    monkeypatch.setattr(coverage, "SIMULATIONS", 100)
    *_, plain, widened = coverage.chosen(12, 100)
    assert plain < 0.93 < widened


# the bold sentence


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "Training raised chosen over rejected, and it looks at the image."),
        (around("win_rate_blank", 0.65, 0.05), "in part without looking at the image."),
        (around("win_rate_blank", 0.9, 0.05), "but mostly without looking at the image."),
        (around("win_rate_over_shuffled", 0.01, 0.2), "but nothing shows that it looks"),
        ({"bag_of_words_wins": 0.7}, "image, and a judge of words alone tells most pairs apart."),
        ({"longer_wins": 0.3}, "image, and length alone tells most pairs apart."),
        ({"win_rate_blank": None, "win_rate_shuffled": None}, "but no control says whether it"),
        (around("win_rate", 0.52, 0.05), "No clear change of preference."),
        (around("win_rate", 0.3, 0.05), "Training raised rejected over chosen."),
    ],
)
def test_the_bold_sentence_has_the_controls_and_the_shortcuts_in_view(changed, expected):
    assert expected in verdicts.title(metrics_of(**changed))
