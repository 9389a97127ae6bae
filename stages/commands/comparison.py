"""Two experiments side by side: what differs between them, on the same pairs, and in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.answers.task_results import Results
from stages.core.errors import UserError
from stages.evaluation import catalogue, paired, statistics
from stages.evaluation.catalogue import ACCURACY, CORRECT, FIGURE, METRICS, NATS, P_VALUE, SHARE
from stages.evaluation.paired import Change
from stages.evaluation.statistics import Floats
from stages.model import formatted
from stages.params.params import Evaluate, differences
from stages.reporting.markup import cell, filled, one_line

TEMPLATE = Path(__file__).with_suffix(".md")
LISTED = 10  # flipped pairs shown of each direction
WIN_RATE = METRICS["win_rate"].title.lower()
PREFERENCE = ACCURACY.title.lower()
RIGHT = CORRECT.title.lower()
CHOSEN = f"{METRICS['chosen_logps_change'].title.lower()}, change in nats"

# Log-probs of one reference are equal to the last bit where it came from DVC's cache. Made again on
# another machine in float32, sums of 10 to 500 nats differ in the fifth digit; bfloat16, 4 bits or
# another image size move them by 0.1 nats and more.
_SAME_NATS, _SAME_SHARE = 1e-3, 1e-4
_ROUNDED = 1e-4  # metrics.json has 6 digits
_LINE = 200  # characters of a question or an answer shown

Flip = tuple[Mapping[str, Any], float, float]


@dataclass(frozen=True)
class Experiment:
    """What a revision holds. ``parameters`` are flat (``train.beta``); ``probed`` is what lm-eval's
    tasks gave, ``pairs`` the test pairs."""

    name: str
    commit: str | None
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    scores: pd.DataFrame
    answers: pd.DataFrame
    probed: Results
    pairs: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.commit or 'the files here'})"

    @property
    def settings(self) -> Evaluate:
        """How intervals are made, of the section ``evaluate`` alone."""
        names = ("confidence", "resamples", "seed")
        return Evaluate.model_construct(
            **{name: self.parameters[f"evaluate.{name}"] for name in names}
        )


@dataclass(frozen=True)
class Column:
    """A value a row of each experiment, and the image of each row."""

    unit: catalogue.Unit
    values: Sequence[Floats]
    images: Any


@dataclass(frozen=True)
class Measure:
    """A figure of both experiments on the same ``rows``: pairs, questions or documents."""

    name: str
    unit: catalogue.Unit
    change: Change
    rows: int


@dataclass(frozen=True)
class Comparison:
    """``gained`` and ``lost`` are (pair, ``margin`` before, after), by the sign of the margin."""

    before: Experiment
    after: Experiment
    measures: tuple[Measure, ...]
    tasks: tuple[Measure, ...]
    margin: str
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    notes: tuple[str, ...]


def compare(before: Experiment, after: Experiment) -> Comparison:
    """Both on the same pairs. The bootstrap's settings are those of ``after``.

    Raises:
        UserError: a revision's files are of different runs, or the test pairs are not the same.
    """
    columns, notes = measured([before, after])
    if apart := paired.different_documents(before.probed, after.probed):
        notes.append(f"{', '.join(apart)}: left out, the two did not answer the same documents")
    first, second = by_id(before.scores), by_id(after.scores)
    margin, margins = "tuned log-prob per token", _tuned_margins
    if WIN_RATE in columns:
        margin, margins = "(log π - log π_ref)", reward_margins
    gained, lost = flips(second["id"], margins(first), margins(second), after.pairs)
    return Comparison(
        before=before,
        after=after,
        measures=tuple(compared(name, one, after.settings) for name, one in columns.items()),
        tasks=tuple(
            Measure(f"{one.task} {one.metric}", FIGURE, one.change, one.documents)
            for one in paired.task_changes(before.probed, after.probed, after.settings)
        ),
        margin=f"{margin} of chosen - that of rejected, in nats",
        gained=gained,
        lost=lost,
        notes=tuple(notes),
    )


def compared(name: str, column: Column, settings: Evaluate) -> Measure:
    """The mean before and after with the paired difference; a share with McNemar's test."""
    before, after = column.values
    tested = [name] if column.unit is SHARE else []
    found = paired.changes({name: (before, after)}, column.images, settings, tested=tested)
    return Measure(name, column.unit, found[name], len(column.images))


def measured(experiments: Sequence[Experiment]) -> tuple[dict[str, Column], list[str]]:
    """What all experiments can be compared by, and why something is left out.

    Where the references differ, win rates are: each would be a comparison with another base model.
    The tuned models' own accuracies need no reference.

    Raises:
        UserError: files are of different runs, or the test pairs are not the same.
    """
    check_comparable(experiments)
    tables = [by_id(one.scores) for one in experiments]
    images = tables[0]["group"].to_numpy()
    wins, order = (
        Column(SHARE, [statistics.outcomes(margins(t)) for t in tables], images)
        for margins in (reward_margins, _tuned_margins)
    )
    changes = [
        statistics.implicit_reward(t["policy_chosen_logps"], t["reference_chosen_logps"], 1.0)
        for t in tables
    ]
    found = {WIN_RATE: wins, PREFERENCE: order, CHOSEN: Column(NATS, changes, images)}
    notes = []
    if differ := max(reference_difference(tables[0], table) for table in tables):
        found = {PREFERENCE: order}
        notes.append(
            f"win rates and changes of log-probs are left out, because the references differ, by "
            f"up to {differ:.3g} nats for one answer; the same model, format and scoring sections, "
            "on the same kind of machine, give one reference"
        )
    asked = [by_id(one.answers[one.answers["of"] == "question"]) for one in experiments]
    same = ["id", "image", "question", "truth"]
    if not all(asked[0][same].equals(table[same]) for table in asked):
        notes.append(f"{RIGHT} are left out, because not all were asked the same questions")
    elif len(asked[0]):
        right = [table["tuned_correct"].to_numpy(float) for table in asked]
        found[RIGHT] = Column(SHARE, right, asked[0]["image"].to_numpy())
    return found, notes


def check_comparable(experiments: Sequence[Experiment]) -> None:
    """Refuse files of different runs, as in a working tree where a stage was stopped, and different
    pairs: what one set lacks may be what is hard.

    Raises:
        UserError: naming the experiment, or the parameters that decide on the pairs.
    """
    first = experiments[0]
    for one in experiments:
        rate = float(statistics.outcomes(reward_margins(one.scores)).mean())
        ids = {pair["id"] for pair in one.pairs}
        if ids != set(one.scores["id"]) or abs(rate - one.metrics["win_rate"]) > _ROUNDED:
            raise UserError(
                f"{one.label}: scores, metrics and test pairs are of different runs; `dvc repro` "
                "makes them again"
            )
        tokens = ["id", "chosen_tokens", "rejected_tokens"]
        here, there = (by_id(each.scores)[tokens] for each in (one, first))
        if one.pairs != first.pairs or not here.equals(there):
            apart = differences(first.parameters, one.parameters)
            sections = ("data.", "preprocess.", "format.", "model.")
            guilty = ", ".join(key for key, _, _ in apart if key.startswith(sections))
            raise UserError(
                f"the test pairs of {first.name} ({len(there)}) and {one.name} ({len(here)}) are "
                "not the same in texts, images and tokens; run one of them again with the data, "
                "preprocess, format and model sections of the other (they differ in "
                f"{guilty or 'none of them: the data changed'})"
            )


def reference_difference(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """The largest difference in nats of the reference's log-probs, 0.0 where all are within
    rounding; rows are the same pairs in the same order."""
    columns = ["reference_chosen_logps", "reference_rejected_logps"]
    first, second = before[columns].to_numpy(float), after[columns].to_numpy(float)
    apart = np.abs(second - first)
    beyond = apart > _SAME_NATS + _SAME_SHARE * np.abs(first)
    return float(apart.max()) if beyond.any() else 0.0


def flips(
    ids: Iterable[str], before: Floats, after: Floats, pairs: Iterable[Mapping[str, Any]]
) -> tuple[tuple[Flip, ...], tuple[Flip, ...]]:
    """The pairs whose outcome (margin above, at or below 0) rose, and those whose fell; largest
    change of margin first."""
    by_name = {pair["id"]: pair for pair in pairs}
    moved = [
        (by_name[one], float(then), float(now))
        for one, then, now in zip(ids, before, after, strict=True)
        if np.sign(now) != np.sign(then)
    ]
    moved.sort(key=lambda flip: (-abs(flip[2] - flip[1]), flip[0]["id"]))
    rose, fell = (tuple(f for f in moved if (f[2] > f[1]) is up) for up in (True, False))
    return rose, fell


def by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id").reset_index(drop=True)


def reward_margins(scores: pd.DataFrame) -> Floats:
    """Reward margins without beta, in nats: beta scales them and cannot change a sign, so they
    compare whatever the two betas are."""
    columns = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    logps = {column: scores[f"{column}_logps"] for column in columns}
    return statistics.reward_margin(**logps, beta=1.0)


def _tuned_margins(scores: pd.DataFrame) -> Floats:
    return scores["tuned_margin"].to_numpy(float)


# in words


def sentence(measure: Measure) -> str:
    """What can be told of a measure, by the rule of ``statistics.direction``."""
    name, change, unit = measure.name, measure.change, measure.unit.difference
    figure = unit.with_interval(change.difference, change.low, change.high)
    if change.low is None or change.high is None:
        return f"{name}: {figure}; too few images for an interval, so no difference can be told."
    if change.direction != "unclear":
        return f"{name}: {change.direction} after, {figure}."
    interval = unit.interval(change.low, change.high)
    why = f"the interval {interval} includes 0"
    if change.low > 0 or change.high < 0:
        why = (
            f"the interval {interval} leaves 0 out, but {change.gained} gained and {change.lost} "
            f"lost can be chance (p = {P_VALUE.text(change.p_value)})"
        )
    return f"{name}: no difference can be told, {why}."


def render(comparison: Comparison) -> str:
    """The comparison as Markdown that reads well unrendered. Whatever comes from data, names or
    parameters is in indented blocks or cells, where Markdown means nothing."""
    return filled(
        TEMPLATE,
        c=comparison,
        block=block,
        table=table,
        sentence=sentence,
        question=formatted.question,
        differences=differences(comparison.before.parameters, comparison.after.parameters),
        listed=LISTED,
        confidence=f"{100 * comparison.after.settings.confidence:g}%",
    )


def table(measures: Sequence[Measure], confidence: str) -> str:
    from tabulate import tabulate

    header = ("measure", "rows", "before", "after", "difference", confidence, "gained", "lost", "p")
    rows = []
    for measure in measures:
        change, unit = measure.change, measure.unit
        tested = (change.gained, change.lost, P_VALUE.text(change.p_value))
        rows.append(
            (
                cell(measure.name),
                f"{measure.rows:,}",
                unit.text(change.before),
                unit.text(change.after),
                unit.difference.text(change.difference),
                unit.difference.interval(change.low, change.high) or "none",
                *(("", "", "") if change.p_value is None else tested),
            )
        )
    aligned = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="pipe", colalign=aligned, disable_numparse=True)


def block(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns, as an indented block; one line each, whatever they hold."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"    {one_line(name, _LINE):{width}}  {one_line(value, _LINE)}".rstrip()
        for name, value in rows
    )
