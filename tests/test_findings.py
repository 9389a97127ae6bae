"""What the metrics say follows from them by rules, and claims no more than their intervals do."""

from typing import Any

import pytest

from stages import findings, report
from stages.metrics import MEANING
from tests.experiment import around, metrics_of, slice_table, uncharted


def test_a_metric_that_nobody_documented_is_listed_by_its_key():
    (row,) = [r for r in findings.singles({**metrics_of(), "novel": 3}) if r.key == "novel"]
    assert (row.value, row.meaning) == ("3", "")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("win_rate", 0.98373, "98.4%"),
        ("win_rate", 1.0, "100.0%"),
        ("accuracy_change", 0.259074, "+25.9 points"),
        ("accuracy_change", -0.1, "−10.0 points"),  # noqa: RUF001
        ("accuracy_change", -0.0001, "0.0 points"),
        ("win_rate_over_blank", 0.4, "+40.0 points"),
        ("questions", 1000, "1,000"),
        ("chosen_logps_change", -7.914, "−7.91"),  # noqa: RUF001
        ("reward_margin", 0.8368, "+0.84"),
        ("accuracy_p_value", 3.7e-56, "< 0.001"),
        ("accuracy_p_value_summed", 0.0213, "0.021"),
        ("base_answer_tokens", 9.4, "9.40"),
        ("lm_eval/pope_random/acc/change", 0.01, "+1.0 points"),
        ("lm_eval/wiki/word_perplexity/base", 12.5, "12.50"),
        ("win_rate", float("nan"), "–"),  # noqa: RUF001
        ("win_rate", None, "–"),  # noqa: RUF001
    ],
)
def test_a_metric_is_shown_in_its_unit(key, value, expected):
    assert findings.shown(key, value) == expected


def test_base_and_tuned_are_compared_with_the_change_that_was_measured_or_their_difference():
    rows = {row.key: row for row in findings.comparisons(metrics_of(accuracy_change=0.5))}
    assert rows["accuracy"].change == "+50.0 points"
    assert rows["accuracy_summed"].change == "+23.0 points"
    assert rows["accuracy_summed"].change_interval == "[17.0,\u00a029.0]"
    assert rows["answer_tokens"].change == "+0.20"
    assert rows["answer_tokens"].change_interval == ""
    assert rows["answer_tokens"].bars == ()
    assert rows["correct"].bars == (("base", 0.4, 0.37, 0.43), ("tuned", 0.9, 0.87, 0.93))


def test_every_control_of_the_metrics_says_what_it_would_show_if_it_were_bad():
    known = {row.key for row in findings.controls(metrics_of())}
    assert known == findings.CONTROLS.keys()
    assert findings.CONTROLS.keys() <= MEANING.keys()


# Words from numbers


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.51, 0.6, "better"),
        (0.4, 0.49, "worse"),
        (0.5, 0.6, "unclear"),
        (0.4, 0.6, "unclear"),
        (None, None, "unclear"),
        (float("nan"), float("nan"), "unclear"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, expected):
    values = {"win_rate": 0.5, "win_rate_low": low, "win_rate_high": high}
    assert findings.verdict(values, "win_rate", 0.5) == expected


def test_the_headline_gives_every_figure_with_its_interval():
    assert findings.headline(metrics_of(pairs=799, images=799)).replace("\u00a0", " ") == (
        "On 799 held-out pairs the tuned model raised chosen over rejected in 95.0% [92.0, 98.0] "
        "of them; it gives chosen the higher log-prob per token in 95.0% [92.0, 98.0], the base in "
        "72.0% [67.0, 77.0]. Of 16 held-out questions it answers 90.0% [87.0, 93.0] right, the "
        "base 40.0% [37.0, 43.0]."
    )


def test_the_headline_does_not_claim_what_the_interval_does_not_show():
    unclear = metrics_of(**around("win_rate", 0.52, 0.05))
    worse = metrics_of(**around("win_rate", 0.3, 0.05))
    assert "not clearly more or less than half" in findings.headline(unclear)
    assert "less than half" in findings.headline(worse)
    assert "No clear change" in report.render(uncharted(metrics=unclear))
    assert "raised rejected over chosen" in report.render(uncharted(metrics=worse))


def test_the_headline_tells_images_from_pairs():
    assert "40 held-out pairs (13 images)" in findings.headline(metrics_of(images=13))


def warnings_of(slices: Any = None, **changed: Any) -> list[str]:
    return [c.text for c in findings.concerns(metrics_of(**changed), slices) if c.warning]


def notes_of(**changed: Any) -> list[str]:
    return [c.text for c in findings.concerns(metrics_of(**changed)) if not c.warning]


def test_good_metrics_raise_no_concern():
    assert findings.concerns(metrics_of(), slice_table()) == []
    assert "No rule raised a warning." in report.render(uncharted())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (around("chosen_logps_change", -2.0, 0.5), "Chosen answers lost probability:"),
        (around("chosen_logps_change", -0.1, 0.5), "lost probability, not clearly"),
        (around("accuracy_change", -0.1, 0.05), "Preference accuracy fell"),
        (around("correct_change", -0.1, 0.05), "Right answers became fewer"),
        (around("lm_eval/pope_random/acc/change", -0.1, 0.05), "pope_random got worse: acc"),
        (around("win_rate_over_blank", 0.1, 0.2), "may not look at the image"),
        (around("win_rate_over_shuffled", 0.1, 0.2), "with another pair's image"),
        (around("win_rate_over_blank", -0.3, 0.1), "may not look at the image"),
        (around("tuned_repetition", 0.5, 0.1), "Answers repeat themselves more"),
        ({"tuned_unfinished": 0.2}, "do not come to an end"),
    ],
)
def test_what_got_worse_is_named_in_a_warning(changed, expected):
    (text,) = warnings_of(**changed)
    assert expected in text
    page = report.render(uncharted(metrics=metrics_of(**changed)))
    assert '<li class="warning"><b>⚠ Warning.</b>' in page


def test_a_worse_lm_eval_metric_is_no_warning_where_lower_is_not_worse():
    values = around("lm_eval/wiki/word_perplexity/change", -3.0, 0.5)
    base = {"lm_eval/wiki/word_perplexity/base": 12.0, "lm_eval/wiki/word_perplexity/tuned": 9.0}
    assert warnings_of(**values, **base) == []


def test_a_slice_that_lost_is_named():
    slices = slice_table()
    slices.loc[1, ["win_rate", "win_rate_low", "win_rate_high"]] = [0.2, 0.1, 0.3]
    (text,) = warnings_of(slices)
    assert "question type = colour" in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (around("base_accuracy", 0.93, 0.02), "little to learn"),
        ({"longer_wins": 0.8}, "preferring the longer answer is right in 80.0%"),
        ({"longer_wins": 0.2}, "preferring the shorter answer is right in 80.0%"),
        ({"ties": 3}, "3 pairs are tied"),
    ],
)
def test_what_a_reader_should_know_is_a_note(changed, expected):
    (text,) = notes_of(**changed)
    assert expected in text
