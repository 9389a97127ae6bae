"""Words follow from the numbers by rules, and claim no more than the intervals do."""

from typing import Any

import pytest

from stages.evaluation import catalogue
from stages.evaluation.catalogue import BOTH, METRICS
from stages.reporting import verdicts
from stages.reporting.page import others, render
from tests.experiment import POPE, around, metrics_of, slice_table, uncharted

EVERY = metrics_of()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.51, 0.6, "better"), (0.4, 0.49, "worse"), (0.4, 0.6, "unclear"), (None, None, "unclear")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, expected):
    values = {"win_rate": 0.5, "win_rate_low": low, "win_rate_high": high}
    assert verdicts.verdict(values, "win_rate") == expected


def test_the_headline_gives_every_figure_with_its_interval():
    assert verdicts.headline(metrics_of(pairs=799, images=799)) == (
        "On 799 held-out pairs the tuned model raised chosen over rejected in 95.0% [92.0, 98.0] "
        "of them; it gives chosen the higher log-prob per token in 95.0% [92.0, 98.0], the base in "
        "72.0% [67.0, 77.0]. Of 16 held-out questions it answers 90.0% [87.0, 93.0] right, the "
        "base 40.0% [37.0, 43.0]."
    )
    assert "40 held-out pairs (13 images)" in verdicts.headline(metrics_of(images=13))


def test_the_headline_does_not_claim_what_the_interval_does_not_show():
    unclear = metrics_of(**around("win_rate", 0.52, 0.05))
    worse = metrics_of(**around("win_rate", 0.3, 0.05))
    assert "not clearly more or less than half" in verdicts.headline(unclear)
    assert "less than half" in verdicts.headline(worse)
    assert "No clear change" in render(uncharted(metrics=unclear))
    assert "raised rejected over chosen" in render(uncharted(metrics=worse))


def concerns_of(slices: Any = None, **changed: Any) -> list[tuple[bool, str]]:
    return [(c.warning, c.text) for c in verdicts.concerns(metrics_of(**changed), slices)]


def test_good_metrics_raise_no_concern():
    assert concerns_of(slice_table()) == []
    assert "No rule raised a warning." in render(uncharted())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (around("chosen_logps_change", -2.0, 0.5), "Chosen answers lost probability:"),
        (around("chosen_logps_change", -0.1, 0.5), "lost probability, not clearly"),
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
        (around("win_rate_blank", 0.92, 0.03), "won without looking: with a blank image"),
        (around("repetition_change", 0.05, 0.02), "Answers repeat themselves more"),
        ({"tuned_unfinished": 0.2}, "do not come to an end"),
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
    page = render(uncharted(slices=slices))
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
        # An untrained model ties everywhere: there is no preference that could be for the words.
        {**around("win_rate", 0.5, 0.0), **around("win_rate_over_blank", 0.0, 0.0)},
    ],
)
def test_a_change_that_could_be_chance_is_no_warning(changed):
    assert not any(is_warning for is_warning, _ in concerns_of(**changed))


def test_of_many_tasks_one_must_be_surer_to_be_told():
    """By chance one of twenty is below 0.05."""
    worse = {**around(f"{POPE}/change", -0.1, 0.05), f"{POPE}/p_value": 0.01}
    assert len(concerns_of(**worse)) == 1
    others = {
        f"lm_eval/task{i}/acc/{what}": value
        for i in range(9)
        for what, value in (("tuned", 0), ("change", 0), ("p_value", 1), ("higher_is_better", 1))
    }
    assert concerns_of(**worse, **others) == []


# tables of metrics


def test_every_metric_is_in_exactly_one_table():
    both = [key for one in BOTH for key in (one.base, one.tuned, one.change)]
    controls = catalogue.controls(EVERY)
    counted = {metric.rows for metric in METRICS.values() if metric.alarm} - {"pairs"}
    rest = others(EVERY)
    shown = [*both, *counted, *(metric.key for metric in (*controls, *rest))]
    assert sorted(shown) == sorted(key for key in METRICS if key in EVERY)
    assert catalogue.of_both_models(EVERY) == list(BOTH)
    assert catalogue.of_both_models({"base_accuracy": 1.0}) == []
