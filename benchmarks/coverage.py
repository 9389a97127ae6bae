"""How often the page warns where nothing changed, and how often the interval of a setting that was
chosen among several holds its true win rate: simulated, by the project's own rules.

    python -m benchmarks.coverage                   # three minutes; docs/evaluation.md quotes it

A third of the figures is right or wrong and has McNemar's test, a third is a ratio of sums, a third
a skewed mean; an image has three documents. Settings have one true rate, so the best was lucky.
"""

from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from stages.answers.task_results import linear
from stages.evaluation import paired, statistics
from stages.evaluation.metrics import with_intervals
from stages.params.params import Evaluate
from stages.reporting import verdicts

SEED, SIMULATIONS = 20261130, 1000
HOW = Evaluate.model_construct(confidence=0.95, resamples=500, seed=0)
RATE = 0.7  # the true win rate of every setting


def main() -> None:
    print(f"seed {SEED}, {SIMULATIONS:,} simulations a row")
    alarms = [[m, n, *false_alarms(m, n)] for m in (6, 20, 40) for n in (30, 200)]
    show(alarms, "figures", "images", "reports with a warning", "ratios and means uncorrected")
    held = [[k, n, *chosen(k, n)] for k in (3, 6, 12) for n in (100, 400)]
    show(held, "settings", "images", "by validation", "widened", "by test", "widened")


def show(rows: list[Any], *header: str) -> None:
    print("\n" + tabulate(rows, header, tablefmt="pipe", floatfmt=".1%"))


def false_alarms(figures: int, images: int) -> list[float]:
    """Shares of reports without any true change that warn: by the page's rule, and if figures
    without a test were judged by their own intervals alone."""
    generator = np.random.default_rng([SEED, figures, images])
    groups, found = np.repeat(np.arange(images), 3), np.zeros(2)
    for _ in range(SIMULATIONS):
        columns = {str(i): figure(i % 3, groups, generator) for i in range(figures)}
        changes = paired.changes(columns, groups, HOW, tested=list(columns)[::3])
        members = [
            verdicts.Member(name, "higher", c.low or 0, c.difference, c.high or 0, c.p_value, "")
            for name, c in changes.items()
        ]
        warns = "worse" in verdicts.judged(members).values()
        alone = [statistics.direction(m.low, m.high) for m in members if m.p_value is None]
        found += warns, warns or "lower" in alone
    return list(found / SIMULATIONS)


def figure(kind: int, groups: Any, generator: np.random.Generator) -> Any:
    """Values of documents before and after, which differ by chance alone."""
    alike = generator.normal(size=groups.max() + 1)[groups]
    both = alike + generator.normal(size=(2, len(groups)))
    if kind == 0:
        return (both > 0.8).astype(float)
    if kind == 1:  # of so many named objects, how many are not there
        of = 1 + generator.poisson(2, size=both.shape)
        parts = generator.binomial(of, 1 / (1 + np.exp(-both)))
        return [np.array(linear(each)) for each in np.stack([parts, of], axis=2).tolist()]
    return both**3


def chosen(settings: int, images: int) -> list[float]:
    """Shares of simulations in which the interval of the best setting's test figure holds the true
    rate: chosen by validation or by the test itself, as it is and widened as a sweep does."""
    generator, held = np.random.default_rng([SEED, settings, images]), np.zeros(4)
    groups = np.repeat(np.arange(images), 2)
    for _ in range(SIMULATIONS):
        alike = generator.normal(size=(2, 1, images))[:, :, groups]
        scores = alike + generator.normal(size=(2, settings, len(groups)))
        won = (scores < np.sqrt(2) * 0.5244).astype(float)  # 0.5244: the normal's 70% quantile
        by_validation, by_test = won.mean(axis=2).argmax(axis=1)
        for place, best in enumerate((by_validation, by_test)):
            of = with_intervals({"win_rate": won[1, best]}, pd.Series(groups), HOW)
            low, rate, high = of["win_rate_low"], of["win_rate"], of["win_rate_high"]
            held[2 * place] += low <= RATE <= high
            low, high = statistics.widened(low, rate, high, HOW.confidence, settings)
            held[2 * place + 1] += low <= RATE <= high
    return list(held / SIMULATIONS)


if __name__ == "__main__":
    main()
