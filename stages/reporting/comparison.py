"""Two experiments side by side: what differs between them, on the same pairs, and in words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.answers import lm_eval
from stages.core.errors import UserError
from stages.evaluation import regression, statistics
from stages.evaluation.catalogue import (
    ACCURACY,
    CORRECT,
    FIGURE,
    METRICS,
    NATS,
    P_VALUE,
    SHARE,
    Unit,
)
from stages.evaluation.paired import Change, changes
from stages.evaluation.statistics import FEW_GROUPS as FEW_IMAGES
from stages.model import formatted
from stages.params.params import PARAMS_FILE
from stages.reporting.text import cell, one_line

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
_ABSENT = object()

Columns = Mapping[str, tuple[statistics.Floats, statistics.Floats]]  # before, after: same rows


@dataclass(frozen=True)
class Experiment:
    """What a revision holds. ``parameters`` are flat (``train.beta``); ``probed`` is what lm-eval's
    tasks gave, ``pairs`` the test pairs; ``stale`` the parameters that were changed after the
    results were made."""

    name: str
    commit: str | None
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    scores: pd.DataFrame
    answers: pd.DataFrame
    probed: lm_eval.Results
    pairs: Sequence[Mapping[str, Any]]
    stale: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.commit is None:
            return f"{self.name} (the files here)"
        return self.name if self.commit.startswith(self.name) else f"{self.name} ({self.commit})"


@dataclass(frozen=True)
class Measure:
    """A figure of both experiments on the same ``rows``: pairs, questions or documents."""

    name: str
    unit: Unit
    change: Change
    rows: int


@dataclass(frozen=True)
class Flip:
    """A pair whose outcome changed, with its margin before and after."""

    id: str
    question: str
    chosen: str
    rejected: str
    before: float
    after: float


@dataclass(frozen=True)
class Settings:
    """How intervals are made; the names are those of the section ``evaluate``."""

    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """``flipped_by`` says what ``gained`` and ``lost`` go by: a measure's name and margin."""

    before: str
    after: str
    parameters: tuple[tuple[str, str, str], ...]
    measures: tuple[Measure, ...]
    tasks: tuple[Measure, ...]
    flipped_by: tuple[str, str]
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    settings: Settings
    notes: tuple[str, ...] = ()


def compare(before: Experiment, after: Experiment) -> Comparison:
    """Both on the same pairs. The bootstrap's settings are those of ``after``.

    Where the references differ, win rates and changes against them are left out: each would be a
    comparison with another base model. The tuned models' own accuracies need no reference.

    Raises:
        UserError: a revision's files are of different runs, or the test pairs are not the same.
    """
    for experiment in (before, after):
        check_one_run(experiment)
    check_same_pairs(before, after)
    first, second = by_id(before.scores), by_id(after.scores)
    notes = [
        f"{experiment.label}: {', '.join(experiment.stale)} changed in {PARAMS_FILE} after the "
        "results were made, so the difference in parameters is not that of the results; "
        "`dvc repro` there"
        for experiment in (before, after)
        if experiment.stale
    ]
    if differ := reference_difference(first, second):
        notes.append(
            f"the references differ, by up to {differ:.3g} nats for one answer: win rates are "
            "against different base models and are left out, so are changes of log-probs. Same "
            "model, format and scoring sections, on the same kind of machine, give one reference"
        )

    settings = settings_of(after)
    images = second["group"].to_numpy()
    margins = (preference_margins(first), preference_margins(second))
    shares = {PREFERENCE: (statistics.outcomes(margins[0]), statistics.outcomes(margins[1]))}
    flipped_by = (PREFERENCE, "tuned log-prob per token of chosen - that of rejected, in nats")
    nats: Columns = {}
    if not differ:
        margins = (reward_margins(first), reward_margins(second))
        wins = (statistics.outcomes(margins[0]), statistics.outcomes(margins[1]))
        shares = {WIN_RATE: wins} | shares
        flipped_by = (WIN_RATE, "(log π - log π_ref) of chosen - that of rejected, in nats")
        nats = {CHOSEN: (_chosen_change(first), _chosen_change(second))}
    measures = measured(shares, images, settings, SHARE) + measured(nats, images, settings, NATS)
    measures += _of_questions(before, after, settings, notes)
    if (count := len(set(images))) < FEW_IMAGES:
        notes.append(f"there are only {count} images: these intervals are too narrow")
    gained, lost = flips(second["id"], margins[0], margins[1], after.pairs)
    return Comparison(
        before=before.label,
        after=after.label,
        parameters=differences(before.parameters, after.parameters),
        measures=tuple(measures),
        tasks=tuple(_of_tasks(before, after, settings, notes)),
        flipped_by=flipped_by,
        gained=gained,
        lost=lost,
        settings=settings,
        notes=tuple(notes),
    )


def check_one_run(experiment: Experiment) -> None:
    """Refuse files that were not made by one run, as in a working tree where a stage was stopped.

    Raises:
        UserError: the scores are of other pairs than the test set, or of another run than the
            metrics.
    """
    ids = [pair["id"] for pair in experiment.pairs]
    if sorted(ids) != sorted(experiment.scores["id"]):
        raise UserError(
            f"{experiment.label}: the scores are not of the pairs in its test set; `dvc repro` "
            "makes both again"
        )
    rate = statistics.win_rate(reward_margins(experiment.scores)).rate
    told = experiment.metrics.get("win_rate")
    if told is None or abs(rate - told) > _ROUNDED:
        raise UserError(
            f"{experiment.label}: the scores give a win rate of {rate:.4f}, the metrics say "
            f"{told}, so they are of different runs; `dvc repro evaluate` makes both again"
        )


def check_same_pairs(before: Experiment, after: Experiment) -> None:
    """Refuse to compare on different pairs: what one set lacks may be what is hard.

    Raises:
        UserError: saying how many pairs are common, and which parameters decide on the pairs.
    """
    first = {pair["id"]: _content(pair) for pair in before.pairs}
    second = {pair["id"]: _content(pair) for pair in after.pairs}
    common = first.keys() & second.keys()
    changed = [key for key in common if first[key] != second[key]]
    tokens = ["chosen_tokens", "rejected_tokens"]
    if len(common) == len(first) == len(second) and not changed:
        counts = [by_id(experiment.scores)[tokens] for experiment in (before, after)]
        if counts[0].equals(counts[1]):
            return
        problem = "the same test pairs became other tokens"
    elif changed:
        problem = f"{len(changed)} of {len(common)} common test pairs have another text or image"
    else:
        problem = (
            f"the test pairs are not the same: {before.name} has {len(first)}, {after.name} "
            f"{len(second)}, {len(common)} of them in common"
        )
    sections = ("data.", "preprocess.", "format.", "model.")
    guilty = [
        key
        for key, _, _ in differences(before.parameters, after.parameters)
        if key.startswith(sections)
    ]
    why = f"they differ in {', '.join(guilty)}" if guilty else "they are equal: the data changed"
    raise UserError(
        f"{problem}; run one of them again with the data, preprocess, format and model sections of "
        f"the other ({why})"
    )


def _content(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    asked = tuple(message["content"] for message in pair["messages"])
    return (*asked, pair["chosen"]["content"], pair["rejected"]["content"], *pair["images"])


def reference_difference(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """The largest difference in nats of the reference's log-probs, 0.0 where all are within
    rounding; rows are the same pairs in the same order."""
    columns = ["reference_chosen_logps", "reference_rejected_logps"]
    first, second = before[columns].to_numpy(float), after[columns].to_numpy(float)
    apart = np.abs(second - first)
    beyond = apart > _SAME_NATS + _SAME_SHARE * np.abs(first)
    return float(apart.max()) if beyond.any() else 0.0


def measured(columns: Columns, images: Any, settings: Settings, unit: Unit) -> list[Measure]:
    """Means before and after with the paired difference; shares with McNemar's test."""
    tested = columns if unit is SHARE else ()
    return [
        Measure(name, unit, change, len(images))
        for name, change in changes(columns, images, settings, tested=tested).items()
    ]


def _of_questions(
    before: Experiment, after: Experiment, settings: Settings, notes: list[str]
) -> list[Measure]:
    """Right answers, where both answered the same questions; else a note says why not."""
    columns = ["id", "image", "question", "truth", "tuned_correct"]
    first, second = (
        by_id(experiment.answers.loc[experiment.answers["of"] == "question", columns])
        for experiment in (before, after)
    )
    if first.empty and second.empty:
        return []
    if not first[columns[:-1]].equals(second[columns[:-1]]):
        notes.append(
            f"right answers are not compared: {len(first)} and {len(second)} questions were asked, "
            "not the same ones; evaluate.generation.questions and the data decide which"
        )
        return []
    right = (
        np.asarray(first["tuned_correct"], dtype=np.float64),
        np.asarray(second["tuned_correct"], dtype=np.float64),
    )
    return measured({RIGHT: right}, second["image"].to_numpy(), settings, SHARE)


def _of_tasks(
    before: Experiment, after: Experiment, settings: Settings, notes: list[str]
) -> list[Measure]:
    """lm-eval's tasks document by document, where both answered the same ones; else a note."""
    if apart := regression.different_documents(before.probed, after.probed):
        notes.append(
            f"{', '.join(apart)}: not compared, since the two did not answer the same documents; "
            "evaluate.lm_eval decides which"
        )
    return [
        Measure(f"{one.task} {one.metric}", FIGURE, one.change, one.documents)
        for one in regression.task_changes(before.probed, after.probed, settings)
    ]


def flips(
    ids: Iterable[str],
    before: statistics.Floats,
    after: statistics.Floats,
    pairs: Iterable[Mapping[str, Any]],
) -> tuple[tuple[Flip, ...], tuple[Flip, ...]]:
    """The pairs whose outcome (margin above, at or below 0) rose, and those whose fell; largest
    change of margin first."""
    texts = {pair["id"]: pair for pair in pairs}
    moved = [
        (float(now - then), one, float(then), float(now))
        for one, then, now in zip(ids, before, after, strict=True)
        if np.sign(now) != np.sign(then)
    ]
    moved.sort(key=lambda item: (-abs(item[0]), item[1]))
    gained: list[Flip] = []
    lost: list[Flip] = []
    for change, one, then, now in moved:
        pair = texts[one]
        said = (pair["chosen"]["content"], pair["rejected"]["content"])
        flip = Flip(one, formatted.question(pair), *said, then, now)
        (gained if change > 0 else lost).append(flip)
    return tuple(gained), tuple(lost)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[tuple[str, str, str], ...]:
    """Keys whose values differ, with both values as JSON writes them; ``-`` where there is none."""

    def shown(parameters: Mapping[str, Any], key: str) -> str:
        return json.dumps(parameters[key], default=str) if key in parameters else "-"

    return tuple(
        (key, shown(before, key), shown(after, key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    )


def by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id").reset_index(drop=True)


def reward_margins(scores: pd.DataFrame) -> statistics.Floats:
    """Reward margins without beta, in nats: beta scales them and cannot change a sign, so they
    compare whatever the two betas are."""
    return statistics.reward_margin(
        scores["policy_chosen_logps"],
        scores["policy_rejected_logps"],
        scores["reference_chosen_logps"],
        scores["reference_rejected_logps"],
        beta=1.0,
    )


def preference_margins(scores: pd.DataFrame) -> statistics.Floats:
    return statistics.preference_margin(
        scores["policy_chosen_logps"],
        scores["policy_rejected_logps"],
        scores["chosen_tokens"],
        scores["rejected_tokens"],
    )


def _chosen_change(scores: pd.DataFrame) -> statistics.Floats:
    return statistics.log_prob_change(
        scores["policy_chosen_logps"], scores["reference_chosen_logps"]
    )


def settings_of(experiment: Experiment) -> Settings:
    names = Settings.__annotations__
    return Settings(**{key: _parameter(experiment, f"evaluate.{key}") for key in names})


def _parameter(experiment: Experiment, key: str) -> Any:
    if key not in experiment.parameters:
        raise UserError(f"{PARAMS_FILE} of {experiment.label} has no {key}; add it there")
    return experiment.parameters[key]


# in words


def sentence(measure: Measure) -> str:
    """What can be told of a measure, by the rule of ``statistics.direction``."""
    name, change = measure.name, measure.change
    unit = measure.unit.difference
    figure = unit.with_interval(change.difference, change.low, change.high)
    if change.low is None or change.high is None:
        return f"{name}: {figure}; too few images for an interval, so no difference can be told."
    if change.difference == change.low == change.high == 0:
        return f"{name}: the same{', row by row' if change.gained == change.lost == 0 else ''}."
    if change.direction != "unclear":
        return f"{name}: {change.direction} after, {figure}."
    interval = unit.interval(change.low, change.high)
    if change.low <= 0 <= change.high:
        return f"{name}: no difference can be told, the interval {interval} includes 0."
    return (
        f"{name}: no difference can be told; the interval {interval} leaves 0 out, but "
        f"{change.gained} gained and {change.lost} lost can be chance "
        f"(p = {P_VALUE.text(change.p_value)})."
    )


def render(comparison: Comparison) -> str:
    """The comparison as Markdown that reads well unrendered. Whatever comes from data, names or
    parameters is in indented blocks or cells, where Markdown means nothing."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"one_line": one_line}
    return (
        environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            c=comparison,
            block=block,
            table=_table,
            sentence=sentence,
            confidence=f"{100 * comparison.settings.confidence:g}%",
            listed=LISTED,
            directions=(("gained", comparison.gained), ("lost", comparison.lost)),
        )
        .rstrip()
        + "\n"
    )


def _table(measures: Sequence[Measure], confidence: str) -> str:
    from tabulate import tabulate

    header = ("measure", "rows", "before", "after", "difference", confidence, "gained", "lost", "p")
    rows = [
        (
            cell(measure.name),
            f"{measure.rows:,}",
            measure.unit.text(measure.change.before),
            measure.unit.text(measure.change.after),
            measure.unit.difference.text(measure.change.difference),
            measure.unit.difference.interval(measure.change.low, measure.change.high) or "none",
            *(
                ("", "", "")
                if measure.change.p_value is None
                else (
                    measure.change.gained,
                    measure.change.lost,
                    P_VALUE.text(measure.change.p_value),
                )
            ),
        )
        for measure in measures
    ]
    aligned = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="pipe", colalign=aligned, disable_numparse=True)


def block(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns, as an indented block; one line each, whatever they hold."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"    {one_line(name, _LINE):{width}}  {one_line(value, _LINE)}".rstrip()
        for name, value in rows
    )
