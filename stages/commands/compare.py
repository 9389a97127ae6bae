"""Compare two experiments pair by pair, with intervals of the differences.

    python -m stages compare --before main --after cold-beta
    python -m stages compare --before HEAD --after workspace > comparison.md

In: two revisions. Each is a commit, branch, tag or the name of a DVC experiment, or ``workspace``
for the files as they are here. Out: the comparison, as Markdown on standard output. Nothing is run
and nothing is checked out. Where results are is read from the command of the stage ``evaluate`` in
``dvc.yaml``, at each revision by itself.

Why not ``dvc metrics diff``: two win rates with an interval each do not say whether they differ.
Both models are measured on the same pairs, so the difference is taken pair by pair, what both find
hard cancels, and its interval is the one to read.
"""

import itertools
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from stages.answers import task_results
from stages.answers.task_results import Results
from stages.core import command
from stages.core.errors import UserError
from stages.evaluation import catalogue, paired, statistics
from stages.evaluation.catalogue import ACCURACY, CORRECT, FIGURE, METRICS, NATS, P_VALUE, SHARE
from stages.evaluation.paired import Change
from stages.evaluation.statistics import Floats
from stages.model import formatted
from stages.params.params import PARAMS_FILE, Evaluate, differences, flattened
from stages.reporting.markup import cell, filled, one_line

TEMPLATE = Path(__file__).with_suffix(".md")
WORKSPACE = "workspace"
STAGE, NEEDED = "evaluate", ("details", "formatted-data")  # and options of its command
LISTED = 10  # flipped pairs shown of each direction
WIN_RATE = METRICS["win_rate"].title.lower()
PREFERENCE = ACCURACY.title.lower()
RIGHT = CORRECT.title.lower()
CHOSEN = f"{METRICS['chosen_logps_change'].title.lower()}, change in nats"

# Log-probs of one reference are equal to the last bit where it came from DVC's cache. Made again on
# another machine in float32, sums of 10 to 500 nats differ in the fifth digit; bfloat16, 4 bits or
# another image size move them by 0.1 nats and more.
_SAME_NATS, _SAME_SHARE = 1e-3, 1e-4
_LINE = 200  # characters of a question or an answer shown

Flip = tuple[Mapping[str, Any], float, float]


@dataclass(frozen=True)
class Experiment:
    """What a revision holds. ``parameters`` are flat (``train.beta``); ``probed`` is what lm-eval's
    tasks gave, ``pairs`` the test pairs."""

    name: str
    commit: str | None
    parameters: Mapping[str, Any]
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


def main(before: str, after: str) -> None:
    print(render(load(before), load(after)), end="")


def render(before: Experiment, after: Experiment) -> str:
    """The comparison as Markdown that reads well unrendered. Whatever comes from data, names or
    parameters is in indented blocks or cells, where Markdown means nothing.

    Raises:
        UserError: as ``measures``.
    """
    found, notes = measures(before, after)
    if apart := paired.different_documents(before.probed, after.probed):
        notes.append(f"{', '.join(apart)}: left out, because the two answered different documents")
    return filled(
        TEMPLATE,
        before=before,
        after=after,
        differences=differences(before.parameters, after.parameters),
        measures=found,
        tasks=[
            Measure(f"{one.task} {one.metric}", FIGURE, one.change, one.documents)
            for one in paired.task_changes(before.probed, after.probed, after.settings)
        ],
        notes=notes,
        flips=flips(before, after) if found[0].name == WIN_RATE else {},
        listed=LISTED,
        confidence=f"{100 * after.settings.confidence:g}%",
        block=block,
        table=table,
        question=formatted.question,
    )


def measures(before: Experiment, after: Experiment) -> tuple[list[Measure], list[str]]:
    """Means before and after with their paired differences, by the bootstrap's settings of
    ``after``; shares with McNemar's test. And notes, as ``measured``.

    Raises:
        UserError: the test pairs are not the same.
    """
    columns, notes = measured([before, after])
    found = []
    for name, column in columns.items():
        first, second = column.values
        tested = [name] if column.unit is SHARE else []
        changes = paired.changes(
            {name: (first, second)}, column.images, after.settings, tested=tested
        )
        found.append(Measure(name, column.unit, changes[name], len(column.images)))
    return found, notes


def measured(experiments: Sequence[Experiment]) -> tuple[dict[str, Column], list[str]]:
    """What all experiments can be compared by, and why something is left out.

    Where the references differ, win rates are: each would be a comparison with another base model.
    The tuned models' own accuracies need no reference.

    Raises:
        UserError: a revision's files are of different runs, or the test pairs are not the same:
            what one set lacks may be what is hard.
    """
    first, tables = experiments[0], [by_id(one.scores) for one in experiments]
    same = ["id", "chosen_tokens", "rejected_tokens"]
    for one, scores in zip(experiments, tables, strict=True):
        if {pair["id"] for pair in one.pairs} != set(scores["id"]):
            raise UserError(
                f"{one.label}: scores and test pairs are of different runs; `dvc repro` makes them "
                "again"
            )
        if one.pairs != first.pairs or not scores[same].equals(tables[0][same]):
            apart = differences(first.parameters, one.parameters)
            sections = ("data.", "preprocess.", "format.", "model.")
            guilty = ", ".join(key for key, _, _ in apart if key.startswith(sections))
            raise UserError(
                f"the test pairs of {first.name} ({len(tables[0])}) and {one.name} ({len(scores)}) "
                "are not the same in texts, images and tokens; run one of them again with the "
                "data, preprocess, format and model sections of the other (they differ in "
                f"{guilty or 'none of them: the data changed'})"
            )
    images, notes = tables[0]["group"].to_numpy(), []
    wins = [statistics.outcomes(reward_margins(table)) for table in tables]
    order = [statistics.outcomes(table["tuned_margin"]) for table in tables]
    changes = [changes_of(table, "chosen") for table in tables]
    found = {
        WIN_RATE: Column(SHARE, wins, images),
        PREFERENCE: Column(SHARE, order, images),
        CHOSEN: Column(NATS, changes, images),
    }
    logps = ["reference_chosen_logps", "reference_rejected_logps"]
    if not all(
        np.allclose(table[logps], tables[0][logps], rtol=_SAME_SHARE, atol=_SAME_NATS)
        for table in tables
    ):
        found = {PREFERENCE: found[PREFERENCE]}
        notes.append(
            "win rates and changes of log-probs are left out, because the references differ; the "
            "same model, format and scoring sections, on the same kind of machine, give one "
            "reference"
        )
    asked = [by_id(one.answers[one.answers["of"] == "question"]) for one in experiments]
    same = ["id", "image", "question", "truth"]
    if not all(asked[0][same].equals(table[same]) for table in asked):
        notes.append(f"{RIGHT} are left out, because not all were asked the same questions")
    elif len(asked[0]):
        right = [table["tuned_correct"].to_numpy(float) for table in asked]
        found[RIGHT] = Column(SHARE, right, asked[0]["image"].to_numpy())
    return found, notes


def flips(before: Experiment, after: Experiment) -> dict[str, list[Flip]]:
    """The pairs ``gained`` and ``lost``, whose reward margin (above, at or below 0) went up or
    down, with their margins before and after in nats; largest change first."""
    by_name = {pair["id"]: pair for pair in after.pairs}
    first, second = by_id(before.scores), by_id(after.scores)
    moved = [
        (by_name[one], float(then), float(now))
        for one, then, now in zip(
            second["id"], reward_margins(first), reward_margins(second), strict=True
        )
        if np.sign(now) != np.sign(then)
    ]
    moved.sort(key=lambda flip: (-abs(flip[2] - flip[1]), flip[0]["id"]))
    return {
        "gained": [flip for flip in moved if flip[2] > flip[1]],
        "lost": [flip for flip in moved if flip[2] < flip[1]],
    }


def by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id").reset_index(drop=True)


def reward_margins(scores: pd.DataFrame) -> Floats:
    """Reward margins without beta, in nats: beta scales them and cannot change a sign, so they
    compare whatever the two betas are."""
    return changes_of(scores, "chosen") - changes_of(scores, "rejected")


def changes_of(scores: pd.DataFrame, side: str) -> Floats:
    """By how many nats training raised the log-prob of the pairs' answers of one side."""
    policy, reference = (scores[f"{of}_{side}_logps"] for of in ("policy", "reference"))
    return statistics.implicit_reward(policy, reference, beta=1.0)


def table(measures: Iterable[Measure], confidence: str) -> str:
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
                statistics.direction(change.low, change.high, change.p_value),
            )
        )
    aligned = ("left", *["right"] * len(header))
    return tabulate(
        rows, (*header, "after is"), tablefmt="pipe", colalign=aligned, disable_numparse=True
    )


def block(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns, as an indented block; one line each, whatever they hold."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"    {one_line(name, _LINE):{width}}  {one_line(value, _LINE)}".rstrip()
        for name, value in rows
    )


# what a revision holds


def load(name: str) -> Experiment:
    """The results of a commit, branch, tag or experiment, or of the ``workspace``.

    Raises:
        UserError: there is no such revision, or it has no results that can be read.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index.index import DataIndexError
    from scmrepo.exceptions import SCMError

    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        try:
            files = DVCFileSystem(rev=None if name == WORKSPACE else name)
            where = options(files.repo.stage.load_one(name=STAGE).cmd)
            details, data = (where[key] for key in NEEDED)
            wanted = (details, f"{data}/test.json", str(PARAMS_FILE))
            for file in [file for path in wanted for file in files.find(path)]:
                (at / file).parent.mkdir(parents=True, exist_ok=True)
                (at / file).write_bytes(files.read_bytes(file))
            return Experiment(
                name=name,
                commit=None if name == WORKSPACE else files.repo.get_rev()[:7],
                parameters=flat((at / PARAMS_FILE).read_text(encoding="utf-8")),
                scores=pd.read_parquet(at / details / "scores.parquet"),
                answers=pd.read_parquet(at / details / "answers.parquet"),
                probed=task_results.read(at / details / "lm_eval"),
                pairs=formatted.read(at / data, "test"),
            )
        except (OSError, KeyError, DvcException, DataIndexError, SCMError) as error:
            why = one_line(str(error).replace(folder, ""), 200)
            raise UserError(
                f"{name} can't be compared ({why}). Name a commit, branch, tag or experiment (`dvc "
                "exp list --all-commits`) that was evaluated, or workspace for the files here. "
                "`dvc fetch --all-commits` gets the results that were pushed for commits, `dvc "
                "exp pull origin NAME` those of an experiment, and `dvc repro` there makes them"
            ) from None


def options(cmd: str) -> dict[str, str]:
    """``--name value`` pairs of a stage's command."""
    return {
        word.removeprefix("--"): value
        for word, value in itertools.pairwise(shlex.split(cmd))
        if word.startswith("--")
    }


def flat(text: str) -> dict[str, Any]:
    return flattened(YAML(typ="safe", pure=True).load(text) or {})


if __name__ == "__main__":
    command.run(main)
