"""What changed between two models that were measured on the same rows, row by row.

Rows are pairs, questions, or the documents of lm-eval's tasks, whose keys in
``results/metrics.json`` (``lm_eval/<task>/<metric>/<what>``) are written and read here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.answers import task_results
from stages.answers.task_results import Results
from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.evaluation.catalogue import Better
from stages.evaluation.statistics import Floats
from stages.params.params import Evaluate

_ROUNDING = 1e-12  # an end of an interval that is nearer to 0 than this is 0, and includes it
PREFIX = "lm_eval"
_WHAT = {  # the last part of a key: what it is of a Change
    "base": "before",
    "tuned": "after",
    "change": "difference",
    "change_low": "low",
    "change_high": "high",
    "gained": "gained",
    "lost": "lost",
    "p_value": "p_value",
}


@dataclass(frozen=True)
class Change:
    """A figure before and after; ``difference`` is after - before, with its interval.

    There is no interval where there are too few images or no values of single rows, and no
    McNemar's test where rows are not right or wrong.
    """

    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class TaskChange:
    """One metric of one of lm-eval's tasks for two models, in the metric's own unit.

    ``better`` is ``None`` where lm-eval does not say; ``documents`` is 0 where the file does not.
    """

    task: str
    metric: str
    change: Change
    better: Better | None
    documents: int = 0


def changes(
    columns: Mapping[str, tuple[Floats, Floats]],
    images: Sequence[object] | np.ndarray[Any, Any],
    settings: Evaluate,
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
        differences = {name: after - before for name, (before, after) in columns.items()}
        intervals = statistics.bootstrap_intervals(differences, images, settings)
    found = {}
    for name, (before, after) in columns.items():
        means = float(before.mean()), float(after.mean()), float((after - before).mean())
        change = Change(*means)
        if interval := intervals.get(name):
            low, high = (
                0.0 if abs(end) < _ROUNDING else end for end in (interval.low, interval.high)
            )
            change = replace(change, low=low, high=high)
        if name in tested:
            test = statistics.mcnemar(before, after)
            change = replace(change, gained=test.gained, lost=test.lost, p_value=test.p_value)
        found[name] = change
    return found


# lm-eval's tasks


def task_changes(before: Results, after: Results, settings: Evaluate) -> list[TaskChange]:
    """Every metric that both have, by task and metric.

    A metric that is a mean over documents, or a ratio of sums, of at least
    ``statistics.FEW_GROUPS`` different images has an interval, from a bootstrap of images of the
    paired differences; where its values are right or wrong, there is McNemar's test too. Tasks that
    the two did not answer the same documents of are left out.
    """
    apart = set(different_documents(before, after))
    first, second = task_results.figures(before), task_results.figures(after)
    found = []
    for task in sorted(first.keys() & second.keys()):
        old, new = first[task], second[task]
        if apart & set(new.parts):
            continue
        columns = {
            metric: (np.array(old.values[metric]), np.array(values))
            for metric, values in new.values.items()
            if len(old.values.get(metric, ())) == len(values) == new.documents
        }
        enough = len(set(new.clusters)) >= statistics.FEW_GROUPS
        tested = [name for name, both in columns.items() if enough and np.isin(both, (0, 1)).all()]
        paired = changes(
            columns, new.clusters, settings, tested=tested, fewest=statistics.FEW_GROUPS
        )
        for metric in sorted(new.metrics.keys() & old.metrics.keys()):
            was, now = old.metrics[metric], new.metrics[metric]
            told = Change(was, now, now - was)
            if metric in paired:
                told = replace(paired[metric], before=was, after=now, difference=now - was)
            better = _better(new.higher_is_better.get(metric))
            found.append(TaskChange(task, metric, told, better, new.documents))
    return found


def _better(higher_is_better: float | None) -> Better | None:
    return None if higher_is_better is None else "higher" if higher_is_better else "lower"


def different_documents(before: Results, after: Results) -> list[str]:
    """Tasks of which the two did not answer the same documents, or only one answered any."""
    first, second = (
        {task: data["shown"] for task, data in of.document.get("datasets", {}).items()}
        for of in (before, after)
    )
    return sorted(
        task for task in first.keys() | second.keys() if first.get(task) != second.get(task)
    )


def of_tasks(base: Results, tuned: Results, settings: Evaluate) -> dict[str, float]:
    """Metrics of base and tuned under flat keys, 6 digits: ``lm_eval/<task>/<metric>/<what>``, with
    ``_WHAT`` is known, and ``higher_is_better`` (1 or 0) where lm-eval says which it is.

    Raises:
        UserError: base and tuned did not answer the same documents.
    """
    if apart := different_documents(base, tuned):
        raise UserError(
            f"base and tuned did not answer the same documents of {', '.join(apart)}; "
            "`dvc repro -f baseline` lets the base answer again"
        )
    flat: dict[str, float] = {}
    for one in task_changes(base, tuned, settings):
        values = {what: getattr(one.change, name) for what, name in _WHAT.items()}
        if one.better:
            values["higher_is_better"] = int(one.better == "higher")
        flat |= {
            f"{PREFIX}/{one.task}/{one.metric}/{what}": float(f"{value:.6g}")
            if isinstance(value, float)
            else value
            for what, value in values.items()
            if value is not None
        }
    return flat


def read_tasks(metrics: Mapping[str, Any]) -> Iterator[TaskChange]:
    """lm-eval's part of ``results/metrics.json``, in the file's order."""
    for key in metrics:
        task_and_metric, _, what = key.removeprefix(f"{PREFIX}/").rpartition("/")
        if not key.startswith(f"{PREFIX}/") or what != "tuned":
            continue
        of = {
            what: metrics.get(f"{PREFIX}/{task_and_metric}/{what}")
            for what in (*_WHAT, "higher_is_better")
        }
        task, _, metric = task_and_metric.partition("/")
        change = Change(**{name: of[what] for what, name in _WHAT.items()})  # type: ignore[arg-type]
        yield TaskChange(task, metric, change, _better(of["higher_is_better"]))
