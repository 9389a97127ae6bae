"""Compare: two experiments side by side, pair by pair, with intervals of the differences.

    python -m stages.compare --before main --after cold-beta
    python -m stages.compare --before HEAD --after workspace --out comparison.md

In: two revisions. Each is a commit, branch, tag or the name of a DVC experiment, or ``workspace``
for the files as they lie here. Out: the comparison on standard output, and as Markdown in ``--out``
(default: nowhere). Nothing is run and nothing is checked out; what is only in DVC's cache, or on
its remote, is read from there.

Why not ``dvc metrics diff``: two win rates with an interval each do not say whether they differ.
Both models are measured on the same pairs, so the difference is taken pair by pair, what both find
hard cancels, and its interval is the one to read.

Where results lie is written once, in the command of the stage ``evaluate`` in ``dvc.yaml``; it is
read from there, at each revision by itself, so that a renamed file does not matter.
"""

import io
import itertools
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.dataset import formatted
from stages.evaluation import statistics
from stages.evaluation.statistics import FEW_GROUPS as FEW_IMAGES
from stages.parameters.params import PARAMS_FILE

WORKSPACE = "workspace"
STAGE = "evaluate"
LISTED = 10  # flipped pairs shown of each direction

# Log-probs of one reference are equal to the last bit where it came from DVC's cache. Made again on
# another machine in float32, sums of 10 to 500 nats differ in the fifth digit; bfloat16, 4 bits or
# another image size move them by 0.1 nats and more.
_SAME_NATS, _SAME_SHARE = 1e-3, 1e-4
_ROUNDED = 1e-4  # metrics.json has 6 digits
_LINE = 200  # characters of a question or an answer shown


Values = tuple[statistics.Floats, statistics.Floats]  # before and after, of the same rows


@dataclass(frozen=True)
class Results:
    """What a revision holds. ``parameters`` are flat (``train.beta``); ``rows`` the test pairs;
    ``stale`` the parameters that were changed after the results were made."""

    name: str
    commit: str | None
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    scores: pd.DataFrame
    answers: pd.DataFrame
    rows: Sequence[Mapping[str, Any]]
    stale: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.commit is None:
            return f"{self.name} (the files here)"
        return self.name if self.commit.startswith(self.name) else f"{self.name} ({self.commit})"


@dataclass(frozen=True)
class Measure:
    """A mean over the same rows before and after. ``unit`` is ``share`` or ``nats``;
    ``difference`` is after - before, ``low`` and ``high`` its interval (``None`` with one image);
    ``test`` only for shares."""

    name: str
    unit: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    rows: int
    images: int
    test: statistics.McNemar | None = None


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
class Comparison:
    """``flipped_by`` says what ``gained`` and ``lost`` go by: a measure's name and margin."""

    before: str
    after: str
    parameters: tuple[tuple[str, str, str], ...]
    measures: tuple[Measure, ...]
    tasks: tuple[tuple[str, float, float], ...]
    flipped_by: tuple[str, str]
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    confidence: float
    resamples: int
    notes: tuple[str, ...] = field(default=())


def main(before: str, after: str, out: Path = Path(os.devnull)) -> None:
    text = render(compare(load(before), load(after)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text, end="")


# --------------------------------------------------------------------------------------------------
# Reading a revision


def load(name: str) -> Results:
    """The results of a revision, through DVC: from Git, the cache, a remote, or the working tree.

    Raises:
        UserError: not a DVC project, no such revision, or it has no results that can be read.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError

    if not Path(".dvc").is_dir():
        raise UserError("there is no DVC project in this folder; run from the project's root")
    files = DVCFileSystem(rev=None if name == WORKSPACE else name)
    try:
        repo = files.repo
    except RevError:
        raise UserError(_no_such(name, _names())) from None
    try:
        stage = repo.stage.load_one(name=STAGE)
    except (DvcException, FileNotFoundError):
        raise UserError(
            f"{name} has no stage {STAGE} in dvc.yaml, so it holds no results to compare"
        ) from None
    made = any(output.hash_info for output in stage.outs)
    at = options(stage.cmd)

    def read(path: str) -> bytes:
        try:
            with files.open(path, "rb") as file:
                return bytes(file.read())
        except (OSError, DvcException) as error:
            raise UserError(_unreadable(name, path, made)) from error

    def table(path: str) -> pd.DataFrame:
        return pd.read_parquet(io.BytesIO(read(path)))

    parameters = YAML(typ="safe", pure=True).load(read(PARAMS_FILE.as_posix()))
    lock = YAML(typ="safe").load(read("dvc.lock")) if made else {}
    return Results(
        name=name,
        commit=None if name == WORKSPACE else repo.get_rev()[:7],
        parameters=flat(parameters),
        metrics=json.loads(read(at["metrics"])),
        scores=table(at["scores"]),
        answers=table(at["answers"]),
        rows=json.loads(read(f"{at['formatted-data']}/test.json")),
        stale=stale(parameters, lock),
    )


def options(cmd: str) -> dict[str, str]:
    """``--name value`` pairs of a stage's command."""
    words = shlex.split(cmd)
    return {
        word.removeprefix("--"): value
        for word, value in itertools.pairwise(words)
        if word.startswith("--")
    }


def flat(document: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value; an empty section is a value."""
    if not isinstance(document, dict) or not document:
        return {prefix.removesuffix("."): document}
    return {
        key: value
        for name, section in document.items()
        for key, value in flat(section, f"{prefix}{name}.").items()
    }


def stale(parameters: Mapping[str, Any], lock: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters that are not what ``dvc.lock`` says a stage ran with, those of a section that it
    ran without included."""
    here = flat(parameters)
    found: set[str] = set()
    for stage in lock.get("stages", {}).values():
        for section, recorded in stage.get("params", {}).get(PARAMS_FILE.as_posix(), {}).items():
            used = flat(recorded, f"{section}.")
            now = {key: here[key] for key in here if f"{key}.".startswith(f"{section}.")}
            found |= {key for key, _, _ in differences(used, now)}
    return tuple(sorted(found))


_ABSENT = object()


def _names() -> list[str]:
    """Experiments, branches and tags."""
    from dvc.repo import Repo

    with Repo() as repo:
        experiments = repo.experiments.ls(all_commits=True).values()
        names = [name for found in experiments for name, _ in found]
        return sorted(names) + sorted(repo.scm.list_branches()) + sorted(repo.scm.list_tags())


def _no_such(name: str, known: Sequence[str]) -> str:
    listed = ", ".join(known[:LISTED]) + (", …" if len(known) > LISTED else "")
    return (
        f"'{name}' is no commit, branch, tag or experiment{did_you_mean(name, known)} (there are: "
        f"{listed or 'none yet'}; `dvc exp list --all-commits` lists experiments, {WORKSPACE} "
        "stands for the files here)"
    )


def _unreadable(name: str, path: str, made: bool) -> str:
    if name == WORKSPACE:
        return f"{path} is missing here; `dvc repro` makes it, or `dvc pull` gets it"
    if not made:
        return (
            f"{name} was not evaluated: its dvc.lock has no results of the stage {STAGE}; run "
            "`dvc repro` there and commit dvc.lock, or name an experiment that was run"
        )
    return (
        f"{path} of {name} is not in DVC's cache; `dvc fetch --all-commits` gets what was pushed "
        "for commits, `dvc exp pull origin NAME` an experiment; else `dvc repro` there makes it"
    )


# --------------------------------------------------------------------------------------------------
# Comparing


def compare(before: Results, after: Results) -> Comparison:
    """Both results on the same pairs. The bootstrap's settings are those of ``after``.

    Where the references differ, win rates and changes against them are left out: each would be a
    comparison with another base model. The tuned models' own accuracies need no reference.

    Raises:
        UserError: a revision's files are of different runs, or the test pairs are not the same.
    """
    for results in (before, after):
        check_whole(results)
    check_same_pairs(before, after)
    first, second = _by_id(before.scores), _by_id(after.scores)
    notes = [
        f"{results.label}: {', '.join(results.stale)} changed in {PARAMS_FILE} after the results "
        "were made, so the difference in parameters is not that of the results; `dvc repro` there"
        for results in (before, after)
        if results.stale
    ]
    if differ := reference_difference(first, second):
        notes.append(
            f"the references differ, by up to {differ:.3g} nats for one answer: win rates are "
            "against different base models and are left out, so are changes of log-probs. Same "
            "model, format and scoring sections, on the same kind of machine, give one reference"
        )

    settings = {
        key: _parameter(after, f"evaluate.{key}") for key in ("confidence", "resamples", "seed")
    }
    images = second["group"].to_numpy()
    accuracy = "preference accuracy, per token"
    margins = (_accuracy_margins(first), _accuracy_margins(second))
    columns = {accuracy: (statistics.outcomes(margins[0]), statistics.outcomes(margins[1]))}
    flipped_by = (accuracy, "tuned log-prob per token of chosen - that of rejected, in nats")
    nats: dict[str, Values] = {}
    if not differ:
        margins = (_margins(first), _margins(second))
        wins = {"win rate": (statistics.outcomes(margins[0]), statistics.outcomes(margins[1]))}
        columns = wins | columns
        flipped_by = ("win rate", "(log π - log π_ref) of chosen - that of rejected, in nats")
        nats = {"change of chosen log-prob": (_chosen_change(first), _chosen_change(second))}
    measures = measured(columns, images, settings) + measured(nats, images, settings, "nats")
    measures += _of_questions(before, after, settings, notes)

    fewest = min(measure.images for measure in measures)
    if fewest < FEW_IMAGES:
        notes.append(f"there are only {fewest} images: these intervals are too narrow")
    gained, lost = flips(second["id"], margins[0], margins[1], after.rows)
    return Comparison(
        before=before.label,
        after=after.label,
        parameters=differences(before.parameters, after.parameters),
        measures=tuple(measures),
        tasks=tuple(
            (key.removeprefix("lm_eval/").removesuffix("/tuned"), before.metrics[key], value)
            for key, value in after.metrics.items()
            if key.startswith("lm_eval/") and key.endswith("/tuned") and key in before.metrics
        ),
        flipped_by=flipped_by,
        gained=gained,
        lost=lost,
        confidence=settings["confidence"],
        resamples=settings["resamples"],
        notes=tuple(notes),
    )


def check_whole(results: Results) -> None:
    """Refuse files that were not made by one run, as in a working tree where a stage was stopped.

    Raises:
        UserError: the scores are of other pairs than the test set, or of another run than the
            metrics.
    """
    ids = [row["id"] for row in results.rows]
    if sorted(ids) != sorted(results.scores["id"]):
        raise UserError(
            f"{results.label}: the scores are not of the pairs in its test set; `dvc repro` makes "
            "both anew"
        )
    rate = statistics.win_rate(_margins(results.scores)).rate
    told = results.metrics.get("win_rate")
    if told is None or abs(rate - told) > _ROUNDED:
        raise UserError(
            f"{results.label}: the scores give a win rate of {rate:.4f}, the metrics say {told}, "
            f"so they are of different runs; `dvc repro {STAGE}` makes both anew"
        )


def check_same_pairs(before: Results, after: Results) -> None:
    """Refuse to compare on different pairs: what one set lacks may be what is hard.

    Raises:
        UserError: saying how many pairs are common, and which parameters decide on the pairs.
    """
    first = {row["id"]: _content(row) for row in before.rows}
    second = {row["id"]: _content(row) for row in after.rows}
    common = first.keys() & second.keys()
    changed = [key for key in common if first[key] != second[key]]
    tokens = ["chosen_tokens", "rejected_tokens"]
    if len(common) == len(first) == len(second) and not changed:
        counts = [_by_id(results.scores)[tokens] for results in (before, after)]
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


def _content(row: Mapping[str, Any]) -> tuple[Any, ...]:
    asked = tuple(message["content"] for message in row["messages"])
    return (*asked, row["chosen"]["content"], row["rejected"]["content"], *row["images"])


def reference_difference(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """The largest difference in nats of the reference's log-probs, 0.0 where all are within
    rounding; rows are the same pairs in the same order."""
    columns = ["reference_chosen_logps", "reference_rejected_logps"]
    first, second = before[columns].to_numpy(float), after[columns].to_numpy(float)
    apart = np.abs(second - first)
    beyond = apart > _SAME_NATS + _SAME_SHARE * np.abs(first)
    return float(apart.max()) if beyond.any() else 0.0


def measured(
    columns: Mapping[str, Values],
    images: Any,
    settings: Mapping[str, Any],
    unit: str = "share",
) -> list[Measure]:
    """Means before and after, of (n,) values each, and the interval of the paired difference."""
    if not columns:
        return []
    gaps = {name: after - before for name, (before, after) in columns.items()}
    count = len(np.unique(images))
    found = (
        statistics.bootstrap_intervals(
            gaps,
            images,
            seed=settings["seed"],
            resamples=settings["resamples"],
            level=settings["confidence"],
        )
        if count > 1
        else {}
    )
    return [
        Measure(
            name=name,
            unit=unit,
            before=float(before.mean()),
            after=float(after.mean()),
            difference=float(gaps[name].mean()),
            low=_end(found[name].low) if name in found else None,
            high=_end(found[name].high) if name in found else None,
            rows=len(before),
            images=count,
            test=statistics.mcnemar(before, after) if unit == "share" else None,
        )
        for name, (before, after) in columns.items()
    ]


def _end(value: float) -> float:
    """An interval's end: what rounding leaves beside 0 (-1e-19) is 0, and includes it."""
    return 0.0 if abs(value) < 1e-12 else value


def _of_questions(
    before: Results, after: Results, settings: Mapping[str, Any], notes: list[str]
) -> list[Measure]:
    """Right answers, where both answered the same questions; else a note says why not."""
    columns = ["id", "image", "question", "truth", "tuned_correct"]
    first, second = (
        _by_id(results.answers.loc[results.answers["of"] == "question", columns])
        for results in (before, after)
    )
    if first.empty and second.empty:
        return []
    if not first[columns[:-1]].equals(second[columns[:-1]]):
        notes.append(
            f"right answers are not compared: {len(first)} and {len(second)} questions were asked, "
            "not the same ones; evaluate.generation.questions and the data decide which"
        )
        return []
    right = (_right(first), _right(second))
    return measured({"right answers": right}, second["image"].to_numpy(), settings)


def _right(answers: pd.DataFrame) -> statistics.Floats:
    return np.asarray(answers["tuned_correct"], dtype=np.float64)


def flips(
    ids: Iterable[str],
    before: statistics.Floats,
    after: statistics.Floats,
    rows: Iterable[Mapping[str, Any]],
) -> tuple[tuple[Flip, ...], tuple[Flip, ...]]:
    """The pairs whose outcome (margin above, at or below 0) rose, and those whose fell; largest
    change of margin first."""
    texts = {row["id"]: row for row in rows}
    moved = [
        (float(now - then), one, float(then), float(now))
        for one, then, now in zip(ids, before, after, strict=True)
        if np.sign(now) != np.sign(then)
    ]
    moved.sort(key=lambda item: (-abs(item[0]), item[1]))
    gained: list[Flip] = []
    lost: list[Flip] = []
    for change, one, then, now in moved:
        row = texts[one]
        question = formatted.question(row)
        flip = Flip(one, question, row["chosen"]["content"], row["rejected"]["content"], then, now)
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


def _by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id").reset_index(drop=True)


def _margins(scores: pd.DataFrame) -> statistics.Floats:
    """Reward margins without beta, in nats: beta scales them and cannot change a sign, and so they
    can stand side by side whatever the two betas are."""
    return statistics.reward_margin(
        scores["policy_chosen_logps"],
        scores["policy_rejected_logps"],
        scores["reference_chosen_logps"],
        scores["reference_rejected_logps"],
        beta=1.0,
    )


def _accuracy_margins(scores: pd.DataFrame) -> statistics.Floats:
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


def _parameter(results: Results, key: str) -> Any:
    if key not in results.parameters:
        raise UserError(f"{PARAMS_FILE} of {results.label} has no {key}; add it there")
    return results.parameters[key]


# --------------------------------------------------------------------------------------------------
# Showing


def verdict(measure: Measure, confidence: float) -> str:
    """The result in words, by one rule.

    A difference is told where the interval of the paired difference leaves 0 out and, for shares,
    McNemar's exact p-value is below 1 - confidence as well. It takes both: the interval knows that
    rows of one image belong together, which the test does not; the test knows that 4 lost and none
    gained can be chance (p = 0.125), where the bootstrap, that draws none of the 4 in only 2% of
    its resamples, leaves 0 out. In every other case no difference can be told, and that is not the
    same as equal.
    """
    name, test = measure.name, measure.test
    if measure.low is None or measure.high is None:
        return f"{name}: all rows share one image, so no difference can be told."
    if measure.difference == measure.low == measure.high == 0:
        return f"{name}: the same, row by row." if test else f"{name}: the same."
    interval = _interval(measure)
    if measure.low <= 0 <= measure.high:
        return f"{name}: no difference can be told, the interval {interval} includes 0."
    if test and test.p_value >= 1 - confidence:
        return (
            f"{name}: no difference can be told; the interval {interval} leaves 0 out, but "
            f"{test.gained} gained and {test.lost} lost can be chance (p = {test.p_value:.2g})."
        )
    direction = "higher" if measure.difference > 0 else "lower"
    amount = _change(abs(measure.difference), measure.unit).removeprefix("+")
    return f"{name}: {direction} after by {amount} {_unit(measure.unit)} {interval}."


def render(comparison: Comparison) -> str:
    """The comparison as Markdown that reads well unrendered. Whatever comes from data, names or
    parameters stands in indented blocks, where Markdown means nothing."""
    percent = f"{comparison.confidence * 100:g}%"
    lines = [
        "# Two experiments side by side",
        "",
        *_block([("before", comparison.before), ("after", comparison.after)]),
        "",
        "## Parameters that differ",
        "",
        *_block([(key, f"{a} → {b}") for key, a, b in comparison.parameters] or [("none", "")]),
        "",
        "## Results",
        "",
        *(f"- {verdict(measure, comparison.confidence)}" for measure in comparison.measures),
        *(f"- Note: {_one_line(note, 1000)}." for note in comparison.notes),
        "",
        *_table(
            ("measure", "rows", "before", "after", "difference", percent, "gained", "lost", "p"),
            [_row(measure) for measure in comparison.measures],
        ),
        "",
        "difference: after - before, row by row, in points (hundredths) for shares and in nats for",
        f"log-probs, with its {percent} interval from {comparison.resamples:,} resamples of whole "
        "images.",
        "gained, lost: rows that went up or down; p: exact McNemar test that both are as likely.",
        "The interval covers the choice of test images, not the luck of training: another",
        "train.seed moves these figures too. docs/evaluation.md says what each measure means.",
    ]
    if comparison.tasks:
        lines += [
            "",
            "## lm-eval tasks",
            "",
            *_table(
                ("task, metric", "before", "after"),
                [(name, f"{a:.4f}", f"{b:.4f}") for name, a, b in comparison.tasks],
            ),
            "",
            "Single questions are not paired here, so there is no interval of the difference.",
        ]
    measure, margin = comparison.flipped_by
    for title, found in (("gained", comparison.gained), ("lost", comparison.lost)):
        shown = f", the {LISTED} largest changes" if len(found) > LISTED else ""
        lines += ["", f"## Pairs {title} in {measure}: {len(found)}{shown}", ""]
        for flip in found[:LISTED]:
            rows = [
                ("pair", flip.id),
                ("margin", f"{flip.before:+.3f} → {flip.after:+.3f}"),
                ("question", flip.question),
                ("chosen", flip.chosen),
                ("rejected", flip.rejected),
            ]
            lines += [*_block(rows), ""]
        lines += [f"margin: {margin}." if found else "None."]
    return "\n".join(lines) + "\n"


def _row(measure: Measure) -> tuple[str, ...]:
    def level(value: float) -> str:
        return f"{value * 100:.1f}%" if measure.unit == "share" else f"{value:+.2f}"

    test = measure.test
    return (
        measure.name,
        f"{measure.rows:,}",
        level(measure.before),
        level(measure.after),
        f"{_change(measure.difference, measure.unit)} {_unit(measure.unit)}",
        "none" if measure.low is None else _interval(measure),
        *((str(test.gained), str(test.lost), f"{test.p_value:.2g}") if test else ("", "", "")),
    )


def _interval(measure: Measure) -> str:
    low, high = (_change(value or 0.0, measure.unit) for value in (measure.low, measure.high))
    return f"[{low}, {high}]"


def _change(value: float, unit: str) -> str:
    # Two digits, so that an interval that just excludes 0 does not end in "0.0".
    return f"{value * 100:+.2f}" if unit == "share" else f"{value:+.3f}"


def _unit(unit: str) -> str:
    return "points" if unit == "share" else "nats"


def _block(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names and values in two columns, as an indented block; one line each, whatever they hold."""
    width = max(len(name) for name, _ in rows)
    return [f"    {_one_line(name):{width}}  {_one_line(value)}".rstrip() for name, value in rows]


def _one_line(text: str, longest: int = _LINE) -> str:
    """Printable characters of one line: data can't end a block or send codes to the terminal."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, figures to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(cells[0]), f"| {' | '.join(rule)} |", *(line(row) for row in cells[1:])]


if __name__ == "__main__":
    command.run(main)
