"""Which metrics stand in which table of the page and the card. What a run lacks has no row."""

from collections.abc import Mapping
from typing import Any

from stages.evaluation import catalogue
from stages.evaluation.catalogue import BOTH, METRICS, Both, Metric, is_known


def both_models(values: Mapping[str, Any]) -> list[Both]:
    """What is measured of base and of tuned."""
    return [both for both in BOTH if both.base in values and both.tuned in values]


def controls(values: Mapping[str, Any]) -> list[Metric]:
    """What else could have made the wins; each says what it would show if it had."""
    return [metric for key, metric in METRICS.items() if metric.alarm and key in values]


def others(values: Mapping[str, Any]) -> list[Metric]:
    """Every metric that ``both_models`` and ``controls`` don't show."""
    shown = {key for both in BOTH for key in (both.base, both.tuned, both.change)}
    shown |= {metric.rows for metric in METRICS.values() if metric.alarm} - {"pairs"}
    return [
        metric
        for key, metric in METRICS.items()
        if key in values and key not in shown and not metric.alarm
    ]


def bars(values: Mapping[str, Any], both: Both) -> list[tuple[str, float, float, float]]:
    """A share of base and of tuned for a chart in a cell: model, estimate, low and high, between 0
    and 1; empty where it is not a share."""
    keys = {"base": both.base, "tuned": both.tuned}
    if both.unit.suffix != "%" or not all(is_known(values[key]) for key in keys.values()):
        return []
    return [
        (model, values[key], *(values.get(f"{key}_{end}", values[key]) for end in catalogue.ENDS))
        for model, key in keys.items()
    ]


def tiles(values: Mapping[str, Any]) -> list[tuple[Metric, str]]:
    """At most four for the first screen: win rate, accuracy, right answers, then what chosen and
    the margin did; each with a note."""
    notes = {
        "win_rate": "50% if nothing was learnt",
        **{
            both.tuned: f"base {catalogue.shown(both.base, values.get(both.base))}"
            for both in (catalogue.ACCURACY, catalogue.CORRECT)
        },
        "chosen_logps_change": "change in nats; below 0 is a loss",
        "reward_margin": "mean; above 0 is a win",
    }
    return [(METRICS[key], note) for key, note in notes.items() if is_known(values.get(key))][:4]
