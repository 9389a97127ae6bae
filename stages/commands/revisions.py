"""Reads the results of a revision through DVC: from Git, the cache, a remote, or the working tree.

Where results are is written once, in the command of the stage ``evaluate`` in ``dvc.yaml``; it is
read from there, at each revision by itself, so that a renamed file does not matter.
"""

import itertools
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.answers import task_results
from stages.answers.task_results import Results
from stages.core.errors import UserError
from stages.model import formatted
from stages.params.params import PARAMS_FILE, SEED, Evaluate, differences, flattened
from stages.reporting.markup import one_line
from stages.tracking.tags import git

WORKSPACE = "workspace"
STAGE = "evaluate"
NEEDED = ("details", "formatted-data")  # options of the stage's command


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
                parameters=_flat((at / PARAMS_FILE).read_text(encoding="utf-8")),
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


def seeds_of(name: str) -> list[Experiment]:
    """The revision ``name`` and every experiment, or commit that experiments start from, whose
    parameters differ from its in ``train.seed`` alone: one for each seed.

    Raises:
        UserError: as ``load``.
    """
    from dvc.repo import Repo

    found = [load(name)]
    with Repo() as repo:
        listed = repo.experiments.ls(all_commits=True)
    experiments = dict(pair for each in listed.values() for pair in each)
    for candidate, rev in (experiments | dict.fromkeys(listed)).items():
        text = git(Path(), "show", f"{rev or candidate}:./{PARAMS_FILE}")
        given = _flat(text) if text else {}
        apart = {key for key, _, _ in differences(found[0].parameters, given)}
        if apart == {SEED} and str(given.get(SEED)) not in map(seed_of, found):
            found.append(load(candidate))
    return found


def seed_of(experiment: Experiment) -> str:
    return str(experiment.parameters.get(SEED))


def options(cmd: str) -> dict[str, str]:
    """``--name value`` pairs of a stage's command."""
    return {
        word.removeprefix("--"): value
        for word, value in itertools.pairwise(shlex.split(cmd))
        if word.startswith("--")
    }


def _flat(text: str) -> dict[str, Any]:
    return flattened(YAML(typ="safe", pure=True).load(text) or {})
