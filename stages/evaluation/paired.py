"""What changed between two models that were measured on the same rows, row by row."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stages.evaluation import statistics
from stages.evaluation.statistics import Direction, Floats

_ROUNDING = 1e-12  # an end of an interval that is nearer to 0 than this is 0, and includes it


class Bootstrap(Protocol):
    """How intervals are made: the section ``evaluate`` of the parameters."""

    @property
    def confidence(self) -> float: ...
    @property
    def resamples(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Change:
    """A figure before and after; ``difference`` is after - before, with its interval.

    ``low`` and ``high`` are ``None`` where there are too few images or no values of single rows;
    ``gained``, ``lost`` and the ``p_value`` of McNemar's test where rows are not right or wrong.
    """

    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None

    @property
    def direction(self) -> Direction:
        return statistics.direction(self.low, self.high, self.p_value)


def changes(
    columns: Mapping[str, tuple[Floats, Floats]],
    images: Sequence[object] | np.ndarray[Any, Any],
    settings: Bootstrap,
    *,
    tested: Collection[str] = (),
    fewest: int = 2,
) -> dict[str, Change]:
    """The change of each column's mean.

    Args:
        columns: name to the values before and after, of shape (n,) each, of the same rows.
        images: (n,) labels; rows of one label are resampled together.
        tested: names of columns whose values are right or wrong (0, ½, 1).
        fewest: with fewer images than this there is no interval.
    """
    intervals = {}
    if columns and len(set(images)) >= fewest:
        intervals = statistics.bootstrap_intervals(
            {name: after - before for name, (before, after) in columns.items()},
            images,
            seed=settings.seed,
            resamples=settings.resamples,
            level=settings.confidence,
        )
    found = {}
    for name, (before, after) in columns.items():
        interval = intervals.get(name)
        test = statistics.mcnemar(before, after) if name in tested else None
        found[name] = Change(
            before=float(before.mean()),
            after=float(after.mean()),
            difference=float((after - before).mean()),
            low=_end(interval.low) if interval else None,
            high=_end(interval.high) if interval else None,
            gained=test.gained if test else None,
            lost=test.lost if test else None,
            p_value=test.p_value if test else None,
        )
    return found


def _end(value: float) -> float:
    return 0.0 if abs(value) < _ROUNDING else value
