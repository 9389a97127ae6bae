"""Settings over their seeds: mean, spread, and a comparison that contains the luck of training.

A setting is what its parameters say, ``train.seed`` aside; its members are experiments of different
seeds. An interval over test images alone says what other images would give this adapter. It does
not say what another seed would give.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.commands.comparison import Experiment, block, measured
from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.evaluation.catalogue import SHARE
from stages.evaluation.statistics import SeedsInterval
from stages.params.params import SEED, differences
from stages.reporting.markup import cell, filled

TEMPLATE = Path(__file__).with_suffix(".md")
DOMINATES = 2 / 3  # of the variance; between this and the rest both matter


def over_seeds(members: Sequence[Sequence[Experiment]]) -> str:
    """One setting, or a second against a first, as Markdown that reads well unrendered; the
    bootstrap's settings are the last one's.

    Raises:
        UserError: a setting has fewer than two seeds, two settings are the same, files are of
            different runs, or the test pairs are not the same.
    """
    from tabulate import tabulate

    for setting in members:
        if len(setting) < 2:
            raise UserError(
                f"{setting[0].label} is the only experiment of its setting (seed "
                f"{seed_of(setting[0])}); `make seeds N=3` trains it with other seeds"
            )
    first, last = members[0][0], members[-1][0]
    names = [setting[0].name for setting in members]
    apart = [each for each in differences(first.parameters, last.parameters) if each[0] != SEED]
    if len(members) == 2 and not apart:
        raise UserError(f"{first.label} and {last.label} differ in {SEED} alone: name one of them")
    columns, notes = measured([one for setting in members for one in setting])
    how = last.settings

    def interval(*tables: Any) -> SeedsInterval:
        return statistics.seeds_interval(tables, images, how)

    rows, told = [], []
    for measure, column in columns.items():
        if column.unit is not SHARE:
            continue
        values, images = column.values, column.images
        tables = [np.stack(values[: len(members[0])]), np.stack(values[-len(members[-1]) :])]
        alone = [interval(table) for table in tables[: len(members)]]
        for name, one in zip(names, alone, strict=True):
            spread = SHARE.difference.text(one.spreads[0]).lstrip("+")
            shown = (SHARE.text(one.estimate), spread, SHARE.interval(*ends(one)))
            rows.append((measure, f"{len(images):,}", cell(name), *shown))
        if len(members) == 2:
            told.append(f"{measure}: {difference(interval(*tables), last.name)}")
        else:
            figure = SHARE.with_interval(alone[0].estimate, *ends(alone[0]))
            told.append(f"{measure}: {figure} over seeds and images. {chance(alone[0])}")
    level = f"{100 * how.confidence:g}%"
    header = ("measure", "rows", "setting", "mean", "between seeds (sd)", f"{level} interval")
    return filled(
        TEMPLATE,
        level=level,
        names=names,
        members=members,
        seed_of=seed_of,
        block=block,
        apart=apart,
        table=tabulate(rows, header, tablefmt="pipe", disable_numparse=True),
        told=told,
        notes=notes,
    )


def seed_of(experiment: Experiment) -> str:
    return str(experiment.parameters.get(SEED))


def ends(share: SeedsInterval) -> tuple[float, float]:
    """Those of the interval, which knows nothing of shares, cut at 0 and 1."""
    return max(0.0, share.low), min(1.0, share.high)


def difference(found: SeedsInterval, after: str) -> str:
    """What can be told of a difference."""
    way = statistics.direction(found.low, found.high)
    shown = SHARE.difference.with_interval(found.estimate, found.low, found.high)
    told = f"no difference can be told, {shown} includes 0"
    if way != "unclear":
        told = f"{way} in {after}, {shown}"
    return f"{told}. {chance(found)}"


def chance(found: SeedsInterval) -> str:
    """Which of the two sources of chance is the larger."""
    text = f"Seeds make {found.seeds_share:.0%} of the variance, test images the rest"
    if found.seeds_share >= DOMINATES:
        text += ": more seeds narrow the interval, more test images hardly do"
    elif found.seeds_share <= 1 - DOMINATES:
        text += ": more test images narrow the interval, more seeds hardly do"
    return f"{text}."
