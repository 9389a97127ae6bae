"""Metrics as rows of text, for the page's tables and the card's.

Metrics are those of ``results/metrics.json``. What a run lacks has no row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stages.evaluation import catalogue, regression
from stages.evaluation.catalogue import BOTH, FIGURE, FRACTION, METRICS, SHARE, Both, is_known
from stages.reporting import verdicts
from stages.reporting.text import rows_of, text_of
from stages.reporting.verdicts import Verdict


@dataclass(frozen=True)
class Figure:
    """A number as text, and its interval, empty where it has none."""

    text: str
    interval: str

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()


@dataclass(frozen=True)
class BothRow:
    """A measure of base and tuned on so many ``rows`` ("799 pairs"). ``bars``, for a chart in a
    cell, are (model, estimate, low, high) between 0 and 1; empty where it is not a share."""

    stem: str
    title: str
    meaning: str
    rows: str
    base: Figure
    tuned: Figure
    change: Figure
    verdict: Verdict
    bars: tuple[tuple[str, float, float, float], ...]


@dataclass(frozen=True)
class Row:
    """A metric of its own; ``pairs`` and ``alarm`` are said of controls."""

    key: str
    meaning: str
    figure: Figure
    pairs: str = ""
    alarm: str = ""


@dataclass(frozen=True)
class TaskRow:
    """A metric of one of lm-eval's tasks for both models."""

    task: str
    metric: str
    base: str
    tuned: str
    change: str
    verdict: Verdict


@dataclass(frozen=True)
class Tile:
    """A large number on the first screen."""

    title: str
    figure: Figure
    note: str


def figure(values: Mapping[str, Any], key: str) -> Figure:
    return Figure(catalogue.shown(key, values.get(key)), catalogue.interval(values, key))


def both_models(values: Mapping[str, Any]) -> list[BothRow]:
    """What is measured of base and of tuned."""
    return [
        BothRow(
            stem=both.stem,
            title=both.title,
            meaning=both.meaning.format(model="the model"),
            rows=f"{catalogue.shown(both.rows, values.get(both.rows))} {both.rows}",
            base=figure(values, both.base),
            tuned=figure(values, both.tuned),
            change=figure(values, both.change),
            verdict=verdicts.verdict(values, both.change),
            bars=_bars(values, both),
        )
        for both in BOTH
        if both.base in values and both.tuned in values
    ]


def _bars(values: Mapping[str, Any], both: Both) -> tuple[tuple[str, float, float, float], ...]:
    if both.unit not in (SHARE, FRACTION):
        return ()
    found = []
    for model, key in (("base", both.base), ("tuned", both.tuned)):
        value = values[key]
        if not is_known(value):
            return ()
        low, high = (values.get(f"{key}_{end}", value) for end in catalogue.ENDS)
        found.append((model, value, low, high))
    return tuple(found)


def tasks(values: Mapping[str, Any]) -> list[TaskRow]:
    """Every metric of every task of lm-eval."""
    return [
        TaskRow(
            one.task,
            one.metric,
            FIGURE.text(one.change.before),
            FIGURE.text(one.change.after),
            FIGURE.difference.with_interval(one.change.difference, one.change.low, one.change.high),
            verdicts.judged(one.change.direction, one.better),
        )
        for one in regression.read(values)
    ]


def controls(values: Mapping[str, Any]) -> list[Row]:
    """What else could have made the wins; each says what it would show if it had."""
    return [
        Row(
            key,
            metric.meaning,
            figure(values, key),
            catalogue.shown(metric.rows, values.get(metric.rows)),
            metric.alarm,
        )
        for key, metric in METRICS.items()
        if metric.alarm and key in values
    ]


def others(values: Mapping[str, Any]) -> list[Row]:
    """Every metric that ``both_models`` and ``controls`` don't show."""
    shown = {key for both in BOTH for key in (both.base, both.tuned, both.change)}
    shown |= {metric.rows for metric in METRICS.values() if metric.alarm} - {"pairs"}
    return [
        Row(key, metric.meaning, figure(values, key))
        for key, metric in METRICS.items()
        if key in values and key not in shown and not metric.alarm
    ]


def tiles(values: Mapping[str, Any]) -> list[Tile]:
    """At most four: win rate, accuracy, right answers, then what chosen and the margin did."""
    base = {
        both.tuned: f"base {catalogue.shown(both.base, values.get(both.base))}"
        for both in (catalogue.ACCURACY, catalogue.CORRECT)
    }
    notes = {
        "win_rate": "50% if nothing was learnt",
        **base,
        "chosen_logps_change": "change in nats; below 0 is a loss",
        "reward_margin": "mean; above 0 is a win",
    }
    found = [
        Tile(METRICS[key].title, figure(values, key), note)
        for key, note in notes.items()
        if is_known(values.get(key))
    ]
    return found[:4]


def slice_rows(slices: pd.DataFrame | None) -> list[dict[str, str]]:
    """Slices as texts, for the table under the chart."""
    return [
        {
            "by": text_of(row.get("by")),
            "slice": text_of(row.get("slice")),
            "pairs": catalogue.shown("pairs", row.get("pairs")),
            "images": catalogue.shown("images", row.get("images")),
            "win_rate": catalogue.with_interval(row, "win_rate"),
            "base": catalogue.shown("base_accuracy", row.get("base_accuracy")),
            "tuned": catalogue.shown("tuned_accuracy", row.get("tuned_accuracy")),
            "note": text_of(row.get("note")),
        }
        for row in rows_of(slices)
    ]
