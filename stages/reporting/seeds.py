"""Settings over their seeds: mean, spread, and a comparison that contains the luck of training.

A setting is what its parameters say, ``train.seed`` aside; its members are experiments of different
seeds. An interval over test images alone says what other images would give this adapter. It does
not say what another seed would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.core.errors import UserError
from stages.evaluation import statistics
from stages.evaluation.catalogue import SHARE
from stages.evaluation.statistics import Floats, SeedsInterval
from stages.reporting.comparison import (
    PREFERENCE,
    RIGHT,
    WIN_RATE,
    Experiment,
    block,
    by_id,
    check_one_run,
    check_same_pairs,
    differences,
    preference_margins,
    reference_difference,
    reward_margins,
    settings_of,
)
from stages.reporting.text import cell

SEED = "train.seed"
DOMINATES = 2 / 3  # of the variance; between this and the rest both matter


@dataclass(frozen=True)
class Figure:
    """A share by setting and seed, each setting's own interval, and that of the difference."""

    name: str
    rows: int
    alone: tuple[SeedsInterval, ...]
    difference: SeedsInterval | None


@dataclass(frozen=True)
class Seeds:
    members: tuple[tuple[Experiment, ...], ...]
    figures: tuple[Figure, ...]
    confidence: float
    notes: tuple[str, ...] = ()


def seed_of(experiment: Experiment) -> str:
    return str(experiment.parameters.get(SEED))


def same_setting(one: Experiment, other: Experiment) -> bool:
    return {key for key, _, _ in differences(one.parameters, other.parameters)} <= {SEED}


def compare(members: Sequence[Sequence[Experiment]], notes: Sequence[str] = ()) -> Seeds:
    """One setting, or a second against a first; the bootstrap's settings are the last one's.

    Raises:
        UserError: a setting has fewer than two seeds, two settings are the same, files are of
            different runs, or the test pairs are not the same.
    """
    for setting in members:
        if len(setting) < 2:
            raise UserError(
                f"{setting[0].label} is the only experiment of its setting (seed "
                f"{seed_of(setting[0])}); `dvc exp run --queue -S train.seed=1,2,3` and `dvc queue "
                "start` train it with others"
            )
    first, last = members[0][0], members[-1][0]
    if len(members) == 2 and same_setting(first, last):
        raise UserError(f"{first.label} and {last.label} differ in {SEED} alone: name one of them")
    everyone = [one for setting in members for one in setting]
    for one in everyone:
        check_one_run(one)
        check_same_pairs(first, one)
    settings = settings_of(last)
    scores = [[by_id(one.scores) for one in setting] for setting in members]
    found: list[str] = list(notes)
    tables = {
        PREFERENCE: [
            np.stack([statistics.outcomes(preference_margins(table)) for table in setting])
            for setting in scores
        ]
    }
    if any(reference_difference(scores[0][0], t) for setting in scores for t in setting):
        found.append("the references differ, so win rates are left out")
    else:
        tables = {
            WIN_RATE: [
                np.stack([statistics.outcomes(reward_margins(table)) for table in setting])
                for setting in scores
            ]
        } | tables
    groups = {name: scores[0][0]["group"].to_numpy() for name in tables}
    if (right := _right_answers(members)) is not None:
        tables[RIGHT], groups[RIGHT] = right
    figures = []
    for name, table in tables.items():

        def interval(settled: Sequence[Floats], name: str = name) -> SeedsInterval:
            return statistics.seeds_interval(
                settled,
                groups[name],
                seed=settings.seed,
                resamples=settings.resamples,
                level=settings.confidence,
            )

        alone = tuple(interval([one]) for one in table)
        both = interval(table) if len(table) == 2 else None
        figures.append(Figure(name, len(groups[name]), alone, both))
    return Seeds(
        tuple(tuple(setting) for setting in members),
        tuple(figures),
        settings.confidence,
        tuple(found),
    )


def _right_answers(
    members: Sequence[Sequence[Experiment]],
) -> tuple[list[Floats], np.ndarray] | None:
    """(seeds, questions) of each setting, and the questions' images; None if not all were asked the
    same ones.
    """
    asked, right = None, []
    for setting in members:
        rows = []
        for one in setting:
            table = by_id(one.answers[one.answers["of"] == "question"])
            if table.empty or (asked is not None and list(asked["id"]) != list(table["id"])):
                return None
            asked = table
            rows.append(np.asarray(table["tuned_correct"], dtype=np.float64))
        right.append(np.stack(rows))
    return None if asked is None else (right, asked["image"].to_numpy())


# in words


def ends(share: SeedsInterval) -> tuple[float, float]:
    """Those of the interval, which knows nothing of shares, cut at 0 and 1."""
    return max(0.0, share.low), min(1.0, share.high)


def sentence(figure: Figure, names: Sequence[str]) -> str:
    """What can be told, and which of the two sources of chance is the larger."""
    found = figure.difference or figure.alone[0]
    share = found.seeds_share
    if share >= DOMINATES:
        chance = (
            f"Seeds make {share:.0%} of the variance: more seeds narrow the interval, more test "
            "images hardly do."
        )
    elif share <= 1 - DOMINATES:
        chance = (
            f"Test images make {1 - share:.0%} of the variance: more of them narrow the interval, "
            "more seeds hardly do."
        )
    else:
        chance = (
            f"Seeds make {share:.0%} of the variance and test images the rest: neither dominates."
        )
    if figure.difference is None:
        figures = SHARE.with_interval(found.estimate, *ends(found))
        return f"{figure.name}: {figures} over seeds and images. {chance}"
    way = statistics.direction(found.low, found.high)
    shown = SHARE.difference.with_interval(found.estimate, found.low, found.high)
    if way == "unclear":
        told = f"no difference can be told, {shown} includes 0"
    else:
        told = f"{way} in {names[1]}, {shown}"
    return f"{figure.name}: {told}. {chance}"


def render(seeds: Seeds) -> str:
    """The comparison as Markdown that reads well unrendered."""
    from tabulate import tabulate

    names = [setting[0].name for setting in seeds.members]
    level = f"{100 * seeds.confidence:g}%"
    lines = [f"# Over seeds: {' and '.join(names)}", ""]
    each = [
        (setting[0].name, f"{len(setting)} seeds: {_listed(setting)}") for setting in seeds.members
    ]
    lines += [block(each), ""]
    if len(seeds.members) == 2:
        apart = differences(seeds.members[0][0].parameters, seeds.members[1][0].parameters)
        lines += ["They differ in:", ""]
        lines += [block([(k, f"{a} → {b}") for k, a, b in apart if k != SEED]), ""]
    rows = []
    for figure in seeds.figures:
        for name, one in zip(names, figure.alone, strict=True):
            spread = SHARE.difference.text(one.spreads[0]).lstrip("+")
            shown = (SHARE.text(one.estimate), spread, SHARE.interval(*ends(one)))
            rows.append((figure.name, f"{figure.rows:,}", cell(name), *shown))
    header = ("measure", "rows", "setting", "mean", "between seeds (sd)", f"{level} interval")
    lines += [tabulate(rows, header, tablefmt="pipe", disable_numparse=True), ""]
    lines += [f"- {sentence(figure, names)}" for figure in seeds.figures]
    lines += [f"- Note: {note}" for note in seeds.notes]
    lines += [
        "",
        f"Intervals ({level}) are over seeds and test images together; docs/evaluation.md says how "
        "they are made.",
    ]
    return "\n".join(lines) + "\n"


def _listed(setting: Sequence[Experiment]) -> str:
    return ", ".join(f"{one.name} ({seed_of(one)})" for one in setting)
