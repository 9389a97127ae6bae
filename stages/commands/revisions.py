"""Reads the results of a revision through DVC: from Git, the cache, a remote, or the working tree.

Where results are is written once, in the command of the stage ``evaluate`` in ``dvc.yaml``; it is
read from there, at each revision by itself, so that a renamed file does not matter.
"""

import itertools
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.answers import lm_eval
from stages.core.errors import UserError, did_you_mean
from stages.model import formatted
from stages.params.params import PARAMS_FILE, flattened
from stages.reporting.comparison import Experiment, differences
from stages.reporting.seeds import SEED, seed_of
from stages.tracking.tags import git

WORKSPACE = "workspace"
STAGE = "evaluate"
NEEDED = ("results", "details", "formatted-data")  # options of the stage's command
LISTED = 10  # names that a message lists


def load(name: str) -> Experiment:
    """The results of a commit, branch, tag or experiment, or of the ``workspace``.

    Raises:
        UserError: not a DVC project, no such revision, or it has no results that can be read.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError
    from dvc_data.index.index import DataIndexError

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
    if missing := [f"--{option}" for option in NEEDED if option not in at]:
        raise UserError(
            f"the stage {STAGE} of {name} has no {' and no '.join(missing)}: {name} was made by an "
            "older version of this pipeline; run its parameters with this one to compare them"
        )

    with tempfile.TemporaryDirectory() as folder:

        def copied(path: str) -> Path:
            """A file or folder of the revision, as it is on disk."""
            try:
                found = files.find(path)
                for one in found:
                    target = Path(folder, one)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with files.open(one, "rb") as file:
                        target.write_bytes(file.read())
            except (OSError, DvcException, DataIndexError) as error:
                raise UserError(_unreadable(name, path, made)) from error
            if not found:
                raise UserError(_unreadable(name, path, made))
            return Path(folder, path)

        def parsed(path: Path) -> Any:
            return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))

        test = copied(f"{at['formatted-data']}/test.json")
        metrics = copied(f"{at['results']}/metrics.json")
        details = copied(at["details"])
        parameters = parsed(copied(PARAMS_FILE.as_posix()))
        lock = parsed(copied("dvc.lock")) if made else {}
        return Experiment(
            name=name,
            commit=None if name == WORKSPACE else repo.get_rev()[:7],
            parameters=flattened(parameters),
            metrics=json.loads(metrics.read_text(encoding="utf-8")),
            scores=pd.read_parquet(details / "scores.parquet"),
            answers=pd.read_parquet(details / "answers.parquet"),
            probed=lm_eval.read(details / "lm_eval"),
            pairs=formatted.read(test.parent, "test"),
            stale=stale(parameters, lock),
        )


def seeds_of(name: str) -> tuple[list[Experiment], list[str]]:
    """The revision ``name`` and every experiment, or commit that experiments start from, whose
    parameters differ from its in ``train.seed`` alone: one for each seed. Also notes on those that
    were left out.

    Raises:
        UserError: as ``load``.
    """
    from dvc.repo import Repo

    found = [load(name)]
    notes = []
    with Repo() as repo:
        listed = repo.experiments.ls(all_commits=True)
    candidates = [one for each in listed.values() for one, _ in each] + list(listed)
    for candidate in candidates:
        text = git(Path(), "show", f"{_revision(candidate, listed)}:./{PARAMS_FILE}")
        given = flattened(YAML(typ="safe", pure=True).load(text) or {}) if text else {}
        if {key for key, _, _ in differences(found[0].parameters, given)} != {SEED}:
            continue
        if str(given.get(SEED)) in {seed_of(one) for one in found}:
            continue
        try:
            found.append(load(candidate))
        except UserError as error:
            notes.append(f"{candidate} (seed {given.get(SEED)}) is left out: {error}")
    return found, notes


def _revision(name: str, listed: Mapping[str, Sequence[tuple[str, str | None]]]) -> str:
    """The commit of an experiment of ``dvc exp list``, else the name itself."""
    by_name = {one: rev for each in listed.values() for one, rev in each}
    return by_name.get(name) or name


def options(cmd: str) -> dict[str, str]:
    """``--name value`` pairs of a stage's command."""
    return {
        word.removeprefix("--"): value
        for word, value in itertools.pairwise(shlex.split(cmd))
        if word.startswith("--")
    }


def stale(parameters: Mapping[str, Any], lock: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters that differ from what ``dvc.lock`` says a stage ran with, new ones of a section
    that it ran with included."""
    here = flattened(parameters)
    found: set[str] = set()
    for stage in lock.get("stages", {}).values():
        for section, recorded in stage.get("params", {}).get(PARAMS_FILE.as_posix(), {}).items():
            used = flattened(recorded, f"{section}.")
            now = {key: here[key] for key in here if f"{key}.".startswith(f"{section}.")}
            found |= {key for key, _, _ in differences(used, now)}
    return tuple(sorted(found))


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
        f"there is no commit, branch, tag or experiment '{name}'{did_you_mean(name, known)} (there "
        f"are: {listed or 'none yet'}; `dvc exp list --all-commits` lists experiments, {WORKSPACE} "
        "means the files here)"
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
        "for commits, `dvc exp pull origin NAME` an experiment (if its .dvc/config names no "
        "remote: after `dvc remote add --local -d storage URL`); else `dvc repro` there makes it"
    )
