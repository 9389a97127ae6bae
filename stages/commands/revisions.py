"""Reads the results of a revision through DVC: from Git, the cache, a remote, or the working tree.

Where results are is written once, in the command of the stage ``evaluate`` in ``dvc.yaml``; it is
read from there, at each revision by itself, so that a renamed file does not matter.
"""

import itertools
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.answers import task_results
from stages.commands.comparison import Experiment
from stages.commands.seeds import seed_of
from stages.core.errors import UserError
from stages.model import formatted
from stages.params.params import PARAMS_FILE, SEED, differences, flattened
from stages.tracking.tags import git

WORKSPACE = "workspace"
STAGE = "evaluate"
NEEDED = ("results", "details", "formatted-data")  # options of the stage's command


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
        raise UserError(
            f"there is no commit, branch, tag or experiment '{name}'; `dvc exp list --all-commits` "
            f"lists experiments, {WORKSPACE} means the files here"
        ) from None
    try:
        at = options(repo.stage.load_one(name=STAGE).cmd)
    except (DvcException, FileNotFoundError):
        at = {}
    if not at.keys() >= {*NEEDED}:
        raise UserError(
            f"{name} has no stage {STAGE} with the options --{', --'.join(NEEDED)} in dvc.yaml; "
            "run its parameters with this version of the pipeline to compare them"
        )
    with tempfile.TemporaryDirectory() as folder:

        def copied(path: str) -> Path:
            """A file or folder of the revision, as it is on disk."""
            try:
                found = files.find(path)
                for one in found:
                    target = Path(folder, one)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(files.read_bytes(one))
            except (OSError, DvcException, DataIndexError):
                found = []
            if not found:
                raise UserError(_unreadable(name, path))
            return Path(folder, path)

        test = copied(f"{at['formatted-data']}/test.json")
        metrics = copied(f"{at['results']}/metrics.json")
        details = copied(at["details"])
        parameters = copied(PARAMS_FILE.as_posix())
        return Experiment(
            name=name,
            commit=None if name == WORKSPACE else repo.get_rev()[:7],
            parameters=_flat(parameters.read_text(encoding="utf-8")),
            metrics=json.loads(metrics.read_text(encoding="utf-8")),
            scores=pd.read_parquet(details / "scores.parquet"),
            answers=pd.read_parquet(details / "answers.parquet"),
            probed=task_results.read(details / "lm_eval"),
            pairs=formatted.read(test.parent, "test"),
        )


def seeds_of(name: str) -> tuple[list[Experiment], list[str]]:
    """The revision ``name`` and every experiment, or commit that experiments start from, whose
    parameters differ from its in ``train.seed`` alone: one for each seed. Also notes on those that
    were left out.

    Raises:
        UserError: as ``load``.
    """
    from dvc.repo import Repo

    found, notes = [load(name)], []
    with Repo() as repo:
        listed = repo.experiments.ls(all_commits=True)
    experiments = dict(pair for each in listed.values() for pair in each)
    for candidate, rev in (experiments | dict.fromkeys(listed)).items():
        text = git(Path(), "show", f"{rev or candidate}:./{PARAMS_FILE}")
        given = _flat(text) if text else {}
        seed = str(given.get(SEED))
        if {key for key, _, _ in differences(found[0].parameters, given)} != {SEED}:
            continue
        if seed in map(seed_of, found):
            continue
        try:
            found.append(load(candidate))
        except UserError as error:
            notes.append(f"{candidate} (seed {seed}) is left out: {error}")
    return found, notes


def options(cmd: str) -> dict[str, str]:
    """``--name value`` pairs of a stage's command."""
    return {
        word.removeprefix("--"): value
        for word, value in itertools.pairwise(shlex.split(cmd))
        if word.startswith("--")
    }


def _flat(text: str) -> dict[str, Any]:
    return flattened(YAML(typ="safe", pure=True).load(text) or {})


def _unreadable(name: str, path: str) -> str:
    if name == WORKSPACE:
        return f"{path} is missing here; `dvc repro` makes it, or `dvc pull` gets it"
    return (
        f"{path} of {name} is not in DVC's cache; `dvc fetch --all-commits` gets what was pushed "
        "for commits, `dvc exp pull origin NAME` an experiment; else `dvc repro` there makes it"
    )
