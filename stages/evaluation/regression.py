"""Did anything get worse? What lm-eval's tasks gave for the base, against the tuned model."""

import numpy as np

from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.parameters.params import Evaluate
from stages.probing import lm_eval


def comparison(
    base: lm_eval.Results, tuned: lm_eval.Results, settings: Evaluate
) -> dict[str, float]:
    """Every figure of base and of tuned, and the change, under flat keys.

    ``lm_eval/<task>/<metric>/`` and then ``base``, ``tuned``, ``change`` (tuned - base, in the
    metric's unit), and ``higher_is_better`` (1 or 0) where lm-eval says which it is. For a metric
    that is a mean over documents, of at least ``statistics.FEW_GROUPS`` different images, there are
    ``change_low`` and ``change_high``, from a bootstrap of images of the paired differences; and
    where its values are right or wrong, ``gained``, ``lost`` and the ``p_value`` of McNemar's test.

    Raises:
        UserError: base and tuned did not answer the same documents.
    """
    _same_documents(base, tuned)
    before, after = lm_eval.outcomes(base), lm_eval.outcomes(tuned)
    flat: dict[str, float] = {}
    for task in sorted(before.keys() & after.keys()):
        old, new = before[task], after[task]
        paired = {
            metric: (np.array(old.values[metric]), np.array(values))
            for metric, values in new.values.items()
            if len(old.values.get(metric, ())) == len(values) == new.documents
        }
        intervals = {}
        if paired and len(set(new.clusters)) >= statistics.FEW_GROUPS:
            intervals = statistics.bootstrap_intervals(
                {metric: last - first for metric, (first, last) in paired.items()},
                new.clusters,
                seed=settings.seed,
                resamples=settings.resamples,
                level=settings.confidence,
            )
        for metric in sorted(new.metrics.keys() & old.metrics.keys()):
            first, last = old.metrics[metric], new.metrics[metric]
            found = {"base": first, "tuned": last, "change": last - first}
            if metric in intervals:
                found |= {
                    "change_low": intervals[metric].low,
                    "change_high": intervals[metric].high,
                }
                if all(np.isin(values, (0.0, 1.0)).all() for values in paired[metric]):
                    test = statistics.mcnemar(*paired[metric])
                    found |= {"gained": test.gained, "lost": test.lost, "p_value": test.p_value}
            better = new.higher_is_better.get(metric)
            if better is not None:
                found["higher_is_better"] = int(better)
            flat |= {f"lm_eval/{task}/{metric}/{what}": value for what, value in found.items()}
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in flat.items()
    }


def _same_documents(base: lm_eval.Results, tuned: lm_eval.Results) -> None:
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
