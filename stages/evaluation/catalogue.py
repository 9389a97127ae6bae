"""Every metric of ``results/metrics.json``: its meaning, its unit, how it is read and judged.

``catalogue.yaml`` has an entry for each key, in the file's order. The ends of an interval have no
entry of their own: ``<key>_low`` and ``<key>_high`` are in the unit of their key. The keys of
lm-eval's tasks are read by ``stages.evaluation.paired``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

from ruamel.yaml import YAML

Better = Literal["higher", "lower"]
ENDS = ("low", "high")


def is_known(value: Any) -> TypeGuard[float]:
    """Whether a metric is there: a number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Unit:
    """How a value reads: ``factor`` times the value with ``digits``, then ``suffix``.

    ``least``: smaller values read as "< least". ``change``: the unit of a difference of two values,
    where that is another one.
    """

    name: str
    digits: int = 2
    signed: bool = False
    factor: float = 1
    suffix: str = ""
    least: float = 0
    change: "Unit | None" = None

    @property
    def difference(self) -> "Unit":
        return self.change or self

    def text(self, value: Any) -> str:
        """``98.4%``, ``+25.9 points``, ``1,000``; a dash for what is not known."""
        if not is_known(value):
            return "\N{EN DASH}"
        if self.least and value < self.least:
            return f"< {self.least:g}"
        return self._number(value, self.digits) + self.suffix

    def interval(self, low: Any, high: Any) -> str:
        """``[97.4, 99.2]``; empty where an end is not known.

        An end near 0 has as many digits as it takes not to show it as 0, which the rules ask for.
        """
        if not (is_known(low) and is_known(high)):
            return ""
        digits = next(
            (
                digits
                for digits in range(self.digits, self.digits + 4)
                if all(end == 0 or round(self.factor * end, digits) for end in (low, high))
            ),
            self.digits,
        )
        return f"[{self._number(low, digits)}, {self._number(high, digits)}]"

    def with_interval(self, value: Any, low: Any, high: Any) -> str:
        """``98.4% [97.4, 99.2]``: the text of every figure, wherever it is shown."""
        return f"{self.text(value)} {self.interval(low, high)}".strip()

    def _number(self, value: float, digits: int) -> str:
        text = f"{self.factor * value:{'+' if self.signed else ''},.{digits}f}"
        if not text.strip("+-0.,"):
            text = text.lstrip("+-")  # 0 has no sign, nor has what is rounded to it
        return text.replace("-", "\N{MINUS SIGN}")


def _unit(name: str, change: Mapping[str, Any] | None = None, **said: Any) -> Unit:
    return Unit(name, **said, change=_unit(**{"name": name, **change}) if change else None)


_UNITS, HEADLINE, _TABLE = YAML(typ="safe").load(Path(__file__).with_suffix(".yaml")).values()
UNITS = {name: _unit(**{"name": name, **said}) for name, said in _UNITS.items()}
COUNT, POINTS, SHARE, FRACTION, NATS, LOG_PROB, MARGIN, TOKENS, P_VALUE, FIGURE = UNITS.values()
ENOUGH_IMAGES = 10  # a group of pairs with fewer distinct images than this gets no rate
WAYS = ("blank", "shuffled")  # what the control pairs show in place of their image


@dataclass(frozen=True)
class Metric:
    """One key of the file.

    ``null``: its value where training changed nothing. ``needs``: what a run must have for the key
    to be there. ``rows``: the key that counts what it is a mean or a count of. ``p_value``: the key
    of its McNemar test. ``alarm``: for a control, what value would be bad and what it would show.
    ``title``: its name for people, where it is shown large.
    """

    key: str
    meaning: str
    unit: Unit
    interval: bool = False
    better: Better | None = None
    null: float = 0
    needs: str = ""
    rows: str = "pairs"
    p_value: str = ""
    alarm: str = ""
    title: str = ""


@dataclass(frozen=True)
class Both(Metric):
    """What is measured of base and of tuned; ``meaning`` has a place for ``{model}``."""

    @property
    def base(self) -> str:
        return f"base_{self.key}"

    @property
    def tuned(self) -> str:
        return f"tuned_{self.key}"

    @property
    def change(self) -> str:
        return f"{self.key}_change"

    def metrics(self) -> tuple[Metric, ...]:
        mean = partial(Metric, interval=True, better=self.better, needs=self.needs, rows=self.rows)
        by = "pair" if self.rows == "pairs" else "question"
        difference = f"{self.tuned} - {self.base}, {by} by {by}"
        base, tuned = (self.meaning.format(model=m) for m in ("the base", "the tuned model"))
        return (
            mean(self.base, base, self.unit),
            mean(self.tuned, tuned, self.unit, title=self.title),
            mean(self.change, difference, self.unit.difference, p_value=self.p_value),
        )


def _entry(key: str, *, both: bool = False, unit: str = "", **said: Any) -> Any:
    """An entry of the table, which is a ``Metric`` or ``Both``."""
    kind, usual = (Both, "share") if both else (Metric, "count")
    return kind(key, unit=UNITS[unit or usual], **said)


_ENTRIES = [_entry(key, **said) for key, said in _TABLE.items()]
BOTH = tuple(entry for entry in _ENTRIES if isinstance(entry, Both))
ACCURACY, ANSWER_TOKENS, REPETITION, UNFINISHED, CORRECT = BOTH
METRICS: Mapping[str, Metric] = {
    metric.key: metric
    for entry in _ENTRIES
    for metric in (entry.metrics() if isinstance(entry, Both) else [entry])
}
# Every key that the file can have, lm-eval's aside, in its order.
KEYS = tuple(
    key
    for metric in METRICS.values()
    for key in (metric.key, *(f"{metric.key}_{end}" for end in ENDS if metric.interval))
)


def of_both_models(values: Mapping[str, Any]) -> list[Both]:
    """What of ``BOTH`` a run has."""
    return [both for both in BOTH if both.base in values and both.tuned in values]


def controls(values: Mapping[str, Any]) -> list[Metric]:
    """What else could have made the wins; each says what it would show if it had."""
    return [metric for key, metric in METRICS.items() if metric.alarm and key in values]


def about(key: str) -> Metric:
    """The entry of a key, or of the key that it is an end of."""
    return METRICS[key if key in METRICS else key.rpartition("_")[0]]


def shown(key: str, value: Any) -> str:
    """A metric as text in its unit: ``98.4%``, ``+25.9 points``, ``1,000``, ``+0.46``."""
    return about(key).unit.text(value)


def interval(values: Mapping[str, Any], key: str) -> str:
    """``[97.4, 99.2]``, in the unit of the metric; empty where it has none."""
    return about(key).unit.interval(*(values.get(f"{key}_{end}") for end in ENDS))


def with_interval(values: Mapping[str, Any], key: str) -> str:
    return f"{shown(key, values.get(key))} {interval(values, key)}".strip()


def in_words(values: Mapping[str, Any]) -> str:
    """The figures that come first, in a line, with their intervals."""
    found = [
        f"chosen-versus-rejected win rate {with_interval(values, 'win_rate')} of "
        f"{values['pairs']:,} held-out pairs"
    ]
    found += [
        f"{both.title.lower()} {with_interval(values, both.base)} → "
        f"{with_interval(values, both.tuned)}"
        for both in (ACCURACY, CORRECT)
        if both.tuned in values
    ]
    return "; ".join(found)
