"""Did anything get worse? What lm-eval's tasks gave for one model, against another.

The keys ``lm_eval/<task>/<metric>/<what>`` of ``results/metrics.json`` are written and read here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stages.answers import lm_eval
from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.evaluation.paired import Bootstrap, Change, changes
from stages.evaluation.statistics import Floats

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
class TaskChange:
    """One metric of one of lm-eval's tasks for two models, in the metric's own unit.

    ``higher_is_better`` is ``None`` where lm-eval does not say; ``documents`` is 0 where the file
    does not say.
    """

    task: str
    metric: str
    change: Change
    higher_is_better: bool | None
    documents: int = 0

    @property
    def better(self) -> Literal["higher", "lower"] | None:
        if self.higher_is_better is None:
            return None
        return "higher" if self.higher_is_better else "lower"


def task_changes(
    before: lm_eval.Results, after: lm_eval.Results, settings: Bootstrap
) -> list[TaskChange]:
    """Every metric that both have, by task and metric.

    A metric that is a mean over documents, of at least ``statistics.FEW_GROUPS`` different images,
    has an interval, from a bootstrap of images of the paired differences; where its values are
    right or wrong, there is McNemar's test too. So has the share of groups of which every document
    is right (``of_groups``).

    Tasks that the two did not answer the same documents of are left out.
    """
    apart = set(different_documents(before, after))
    first, second = lm_eval.figures(before), lm_eval.figures(after)
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
        right_or_wrong = [
            metric
            for metric, both in columns.items()
            if enough and all(np.isin(values, (0.0, 1.0)).all() for values in both)
        ]
        paired = changes(
            columns, new.clusters, settings, tested=right_or_wrong, fewest=statistics.FEW_GROUPS
        )
        for metric in new.metrics.keys() - columns.keys():
            samples = [
                [row for part in new.parts for row in results.samples.get(part, [])]
                for results in (before, after)
            ]
            grouped, together = of_groups(metric, *samples)
            if len(set(together)) >= statistics.FEW_GROUPS:
                paired |= changes({metric: grouped}, together, settings, tested=[metric])
        for metric in sorted(new.metrics.keys() & old.metrics.keys()):
            told = (old.metrics[metric], new.metrics[metric])
            plain = Change(*told, told[1] - told[0])
            change = replace(
                paired.get(metric, plain),
                before=plain.before,
                after=plain.after,
                difference=plain.difference,
            )
            better = new.higher_is_better.get(metric)
            found.append(TaskChange(task, metric, change, better, new.documents))
    return found


def of_groups(
    metric: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
) -> tuple[tuple[Floats, Floats], list[str]]:
    """Groups of documents that are right where each of them is, as HallusionBench's figures and
    questions: 0 or 1 before and after, of shape (groups,) each, and labels to resample them by.

    A document's value of such a metric is its group and whether it is right. Groups that share an
    image, directly or through others, have one label: a figure of HallusionBench is an image, a
    question is asked of all figures of its set. Nothing where the metric is another kind.
    """
    right: tuple[dict[str, bool], ...] = ({}, {})
    for rows, found in zip((before, after), right, strict=True):
        for value in (row["metrics"].get(metric) for row in rows):
            match value:
                case [str(group), bool(one)]:
                    found[group] = found.get(group, True) and one
                case _:
                    return (np.empty(0), np.empty(0)), []
    shown: dict[str, set[str]] = {}
    for row in after:
        image = " ".join(row["images"]) or str(row["doc_id"])
        shown.setdefault(row["metrics"][metric][0], set()).add(image)
    label: dict[str, str] = {}
    for seen in shown.values():
        joined = {label.get(image, image) for image in seen}
        label |= dict.fromkeys(seen, min(joined))
        label |= {image: min(joined) for image, old in label.items() if old in joined}
    values = tuple(np.array([float(found[group]) for group in shown]) for found in right)
    return (values[0], values[1]), [label[min(seen)] for seen in shown.values()]


def different_documents(before: lm_eval.Results, after: lm_eval.Results) -> list[str]:
    """Tasks of which the two did not answer the same documents, or only one answered any."""
    first, second = (
        {task: data["shown"] for task, data in results.document.get("datasets", {}).items()}
        for results in (before, after)
    )
    return sorted(
        task for task in first.keys() | second.keys() if first.get(task) != second.get(task)
    )


def comparison(
    base: lm_eval.Results, tuned: lm_eval.Results, settings: Bootstrap
) -> dict[str, float]:
    """Metrics of base and tuned under flat keys, 6 digits.

    ``lm_eval/<task>/<metric>/`` and then ``base``, ``tuned``, ``change`` (tuned - base), where they
    are known ``change_low``, ``change_high``, ``gained``, ``lost`` and ``p_value``, and
    ``higher_is_better`` (1 or 0) where lm-eval says which it is.

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
        if one.higher_is_better is not None:
            values["higher_is_better"] = int(one.higher_is_better)
        flat |= {
            f"{PREFIX}/{one.task}/{one.metric}/{what}": float(f"{value:.6g}")
            if isinstance(value, float)
            else value
            for what, value in values.items()
            if value is not None
        }
    return flat


def read(metrics: Mapping[str, Any]) -> Iterator[TaskChange]:
    """lm-eval's part of ``results/metrics.json``, in the file's order."""
    for key in metrics:
        prefix, _, rest = key.partition("/")
        task, _, rest = rest.partition("/")
        metric, _, what = rest.rpartition("/")
        if prefix != PREFIX or what != "tuned":
            continue
        values = {
            name: metrics.get(f"{PREFIX}/{task}/{metric}/{what}") for what, name in _WHAT.items()
        }
        better = metrics.get(f"{PREFIX}/{task}/{metric}/higher_is_better")
        yield TaskChange(
            task,
            metric,
            Change(**values),  # type: ignore[arg-type]
            None if better is None else bool(better),
        )
