"""Did anything get worse? What lm-eval's tasks gave for the base, against the tuned model."""

from stages import statistics, tasks
from stages.errors import UserError
from stages.params import Evaluate


def comparison(base: tasks.Results, tuned: tasks.Results, settings: Evaluate) -> dict[str, float]:
    """Every figure of base and of tuned, and the change, under flat keys.

    ``lm_eval/<task>/<metric>/`` and then ``base``, ``tuned``, ``change`` (tuned - base, in the
    metric's unit), ``change_low`` and ``change_high``. The interval is of the mean over documents
    of the paired differences, by a bootstrap of images (``statistics.bootstrap_intervals``), so it
    is there only for metrics that are such means, and only where documents show at least two
    different images.

    Raises:
        UserError: base and tuned did not answer the same documents.
    """
    _same_documents(base, tuned)
    before, after = tasks.outcomes(base), tasks.outcomes(tuned)
    flat: dict[str, float] = {}
    for task in sorted(before.keys() & after.keys()):
        outcome = after[task]
        paired = {
            metric: [new - old for old, new in zip(before[task].values[metric], new_, strict=True)]
            for metric, new_ in outcome.values.items()
            if len(before[task].values.get(metric, ())) == len(new_) == outcome.documents
        }
        intervals = {}
        if paired and len(set(outcome.clusters)) > 1:
            intervals = statistics.bootstrap_intervals(
                paired,
                outcome.clusters,
                seed=settings.seed,
                resamples=settings.resamples,
                level=settings.confidence,
            )
        for metric in sorted(outcome.metrics.keys() & before[task].metrics.keys()):
            key = f"lm_eval/{task}/{metric}"
            old, new = before[task].metrics[metric], outcome.metrics[metric]
            flat |= {f"{key}/base": old, f"{key}/tuned": new, f"{key}/change": new - old}
            if metric in intervals:
                flat[f"{key}/change_low"] = intervals[metric].low
                flat[f"{key}/change_high"] = intervals[metric].high
    return {key: float(f"{value:.6g}") for key, value in flat.items()}


def _same_documents(base: tasks.Results, tuned: tasks.Results) -> None:
    shown = [
        {task: data["shown"] for task, data in results.document.get("datasets", {}).items()}
        for results in (base, tuned)
    ]
    different = sorted(
        task
        for task in shown[0].keys() | shown[1].keys()
        if shown[0].get(task) != shown[1].get(task)
    )
    if different:
        raise UserError(
            f"base and tuned did not answer the same documents of {', '.join(different)}; "
            "`dvc repro -f reference` lets base answer anew"
        )
