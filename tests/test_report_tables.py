"""Rows of the page's and the card's tables."""

from stages.evaluation.catalogue import BOTH, METRICS
from stages.reporting import tables
from tests.experiment import around, metrics_of


def test_base_and_tuned_have_their_figures_the_paired_change_and_bars_where_they_are_shares():
    rows = {row.stem: row for row in tables.both_models(metrics_of())}
    assert list(rows) == [both.stem for both in BOTH]
    summed = rows["accuracy_summed"]
    assert (summed.change.text, summed.change.interval) == ("+23.0 points", "[+17.0, +29.0]")
    assert str(summed.change) == "+23.0 points [+17.0, +29.0]"
    assert rows["answer_tokens"].change.text == "+0.20"
    assert rows["answer_tokens"].bars == ()
    assert rows["correct"].bars == (("base", 0.4, 0.37, 0.43), ("tuned", 0.9, 0.87, 0.93))
    assert (rows["correct"].rows, rows["accuracy"].rows) == ("16 questions", "40 pairs")


def test_without_intervals_there_are_none_and_bars_are_points():
    plain = metrics_of(
        **dict.fromkeys(key for key in metrics_of() if key.endswith(("_low", "_high")))
    )
    rows = {row.stem: row for row in tables.both_models(plain)}
    assert rows["accuracy"].base.interval == ""
    assert rows["accuracy"].bars == (("base", 0.72, 0.72, 0.72), ("tuned", 0.95, 0.95, 0.95))


def test_every_metric_is_in_exactly_one_table():
    values = metrics_of()
    both = [key for one in BOTH for key in (one.base, one.tuned, one.change)]
    controls = tables.controls(values)
    counted = {metric.rows for metric in METRICS.values() if metric.alarm} - {"pairs"}
    shown = [*both, *counted, *(row.key for row in (*controls, *tables.others(values)))]
    assert sorted(shown) == sorted(key for key in METRICS if key in values)
    assert all(row.alarm and row.pairs for row in controls)


def test_tasks_of_lm_eval_read_as_lm_eval_prints_them():
    (row,) = tables.tasks(metrics_of(**around("lm_eval/pope_random/acc/change", 0.1, 0.05)))
    assert (row.task, row.metric, row.base, row.tuned) == ("pope_random", "acc", "0.800", "0.810")
    assert row.change == "+0.100 [+0.050, +0.150]"
    assert row.verdict == "unclear"  # its p-value is 1
