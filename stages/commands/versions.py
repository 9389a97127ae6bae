"""Versions of the adapter: GTO's tags in Git, and whether a new one is defensible.

A version is an annotated tag ``adapter@v1.0.0``, which ``dvc artifacts get``, GTO and DVC Studio
read. The champion is the highest version: Git is the truth, MLflow's alias mirrors it.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.commands import comparison, revisions
from stages.commands.outputs import Places
from stages.core.errors import UserError
from stages.core.text import listed
from stages.evaluation import paired
from stages.reporting import verdicts
from stages.tracking.tags import git

ARTIFACT = "adapter"  # its name under `artifacts` in dvc.yaml
LISTED = 5  # names that a refusal lists


def tag_of(version: str) -> str:
    return f"{ARTIFACT}@{version}"


def champion(version: str) -> str | None:
    """The highest version below this one that has a tag.

    Raises:
        UserError: no version's name, or not above all others.
    """
    from gto.base import sort_versions
    from gto.constants import Action
    from gto.tag import find, parse_tag
    from gto.versions import SemVer
    from scmrepo.exceptions import SCMError
    from scmrepo.git import Git

    if not SemVer.is_valid(version or " "):
        raise UserError(f"'{version}' is not a version; write it as VERSION=v1.0.0")
    try:
        with Git() as scm:
            tags = [parse_tag(tag) for tag in find(Action.REGISTER, name=ARTIFACT, scm=scm)]
    except SCMError:
        raise UserError("there is no Git repository here; run from the project's root") from None
    others = [each.version for each in sort_versions(tags) if each.version != version]
    if others and not SemVer(others[0]) < SemVer(version):
        raise UserError(f"{version} is not above {others[0]}, the highest version so far")
    return others[0] if others else None


def commit_of(version: str) -> str:
    """The commit that has the tag of this version; empty if there is none."""
    return git(
        Path(), "rev-parse", "--verify", "--quiet", f"refs/tags/{tag_of(version)}^{{commit}}"
    )


def register(version: str, message: str) -> None:
    """Tag the current commit."""
    from gto import api
    from gto.exceptions import GTOException

    try:
        api.register(".", ARTIFACT, "HEAD", version=version, message=message)
    except GTOException as error:
        raise UserError(f"GTO refuses {tag_of(version)}: {error}") from None


def unready() -> Iterator[str]:
    """Why the current commit can't be released: its files are not those that others would get."""
    from dvc.repo import Repo

    changed = [line[3:] for line in git(Path(), "status", "--porcelain").splitlines()]
    if changed:
        yield f"changes are not committed: {listed(changed, LISTED, longest=200)}"
    logging.getLogger("dvc").setLevel(logging.ERROR)  # what it warns of is said below
    with Repo() as repo:
        if stale := sorted(repo.status()):
            yield f"dvc.lock is not current: {listed(stale, LISTED)} would run again (`dvc repro`)"
        # Others have the configuration of the commit: not config.local, nor this user's own.
        committed = repo.config.read("repo")
        name = committed.get("core", {}).get("remote")
        if not committed.get("remote", {}).get(name, {}).get("url"):
            yield (
                "the committed .dvc/config names no remote, so nobody else would get the outputs "
                "(`dvc remote add -d storage …` without --local, commit it, `dvc push`)"
            )
        elif missing := unpushed(repo, name):
            yield f"the DVC remote lacks {listed(missing, LISTED, longest=200)} (`dvc push`)"


def unpushed(repo: Any, remote: str) -> list[str]:
    """Outputs of which this DVC remote lacks something.

    DVC's own status says nothing of a folder whose list of files is neither in the cache nor in the
    remote, so each output's hash is looked up as well.
    """
    store = repo.cloud.get_remote_odb(remote)
    cached = [out for out in repo.index.outs if out.use_cache and out.hash_info]
    found = {str(out) for out in cached if not store.exists(out.hash_info.value)}
    states = repo.status(cloud=True, remote=remote)
    found |= {name for name, state in states.items() if state != "deleted"}
    return sorted(found)


def undefensible(at: Places, before: str | None) -> Iterator[str]:
    """Why the adapter here is not shown to be better than the champion, or where there is none,
    than the base; and what got worse.
    """
    metrics = json.loads((at.results / "metrics.json").read_text(encoding="utf-8"))
    for one in verdicts.worse_tasks(paired.read_tasks(metrics)):
        yield verdicts.got_worse(one)
    if before is None:
        if verdicts.verdict(metrics, "win_rate") != "better":
            yield verdicts.headline(metrics)
        return
    old, new = revisions.load(tag_of(before)), revisions.load(revisions.WORKSPACE)
    try:
        found = comparison.compare(old, new)
    except UserError as error:
        yield f"it can't be compared with {before}: {error}"
        return
    for one in verdicts.worse_tasks(paired.task_changes(old.probed, new.probed, new.settings)):
        yield f"Against {before}, {verdicts.got_worse(one)}"
    rates = [one for one in found.measures if one.name == comparison.WIN_RATE]
    if not rates:
        yield f"its win rate can't be compared with that of {before}: {' '.join(found.notes)}"
    for rate in rates:
        change = rate.change
        if change.direction != "higher":
            difference = rate.unit.difference.with_interval(
                change.difference, change.low, change.high
            )
            yield f"its win rate is not clearly above that of {before}: {difference}"
