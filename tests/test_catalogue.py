"""The catalogue: every key has a unit that shows it, and what must agree with it does."""

import pytest

from stages.evaluation import catalogue
from stages.evaluation.catalogue import BOTH, FIGURE, HEADLINE, KEYS, METRICS, POINTS, SHARE


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("win_rate", 0.98373, "98.4%"),
        ("win_rate_low", 0.98373, "98.4%"),
        ("win_rate", 1.0, "100.0%"),
        ("accuracy_gained", 207, "207"),
        ("accuracy_gained", 207.0, "207"),
        ("accuracy_change", 0.259074, "+25.9 points"),
        ("accuracy_change", -0.1, "−10.0 points"),  # noqa: RUF001
        ("accuracy_change", -0.0001, "0.0 points"),
        ("win_rate_over_blank", 0.4, "+40.0 points"),
        ("questions", 1000, "1,000"),
        ("chosen_logps_change", -7.914, "−7.91"),  # noqa: RUF001
        ("reward_margin", 0.8368, "+0.84"),
        ("accuracy_p_value", 3.7e-56, "< 0.001"),
        ("correct_p_value", 0.0213, "0.021"),
        ("base_answer_tokens", 9.4, "9.40"),
        ("base_unfinished", 0.0123, "1.2%"),
        ("win_rate", float("nan"), "–"),  # noqa: RUF001
        ("win_rate", None, "–"),  # noqa: RUF001
    ],
)
def test_a_metric_is_shown_as_people_write_it(key, value, expected):
    assert catalogue.shown(key, value) == expected


def test_a_figure_and_its_interval_are_one_text():
    values = {"win_rate": 0.95, "win_rate_low": 0.92, "win_rate_high": 0.98}
    assert catalogue.with_interval(values, "win_rate") == "95.0% [92.0, 98.0]"
    assert catalogue.with_interval({"win_rate": 0.95}, "win_rate") == "95.0%"
    assert FIGURE.difference.with_interval(0.1, 0.05, 0.15) == "+0.100 [+0.050, +0.150]"


def test_an_end_that_is_not_0_is_not_shown_as_0():
    assert POINTS.interval(0.0004, 0.2) == "[+0.04, +20.00]"
    assert POINTS.interval(0.0, 0.2) == "[0.0, +20.0]"
    assert SHARE.interval(0.2, 0.4) == "[20.0, 40.0]"


def test_what_an_entry_refers_to_exists():
    for metric in METRICS.values():
        assert metric.rows in METRICS
        assert not metric.p_value or metric.p_value in METRICS
        assert "|" not in metric.meaning + metric.needs + metric.alarm
    for both in BOTH:
        assert {both.base, both.tuned, both.change} <= METRICS.keys()
    need = METRICS["win_rate_without_length"].needs
    assert need.startswith(f"{catalogue.ENOUGH_IMAGES} images")
    assert set(HEADLINE.values()) <= set(KEYS)
    assert len(HEADLINE) <= 8
    assert all(len(short) <= 12 for short in HEADLINE)
