"""Release: the adapter here as a version that others get by name.

    make release VERSION=v1.0.0

In: the current commit with its outputs. Refused: changes that are not committed, a ``dvc.lock``
that is not current, and outputs that others could not get from the remote of the committed
configuration. Out: an annotated tag in GTO's form, ``adapter@v1.0.0``, which ``dvc artifacts get``
and DVC Studio read. Git itself makes it, so that it is signed where your Git signs tags
(``tag.gpgSign``); the commit's dvc.lock has the hash of every output. MLflow's registry gets the
version too, by reference. Nothing is pushed: the last line says how.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.commands import outputs
from stages.core import command
from stages.core.errors import UserError
from stages.core.text import listed
from stages.reporting import verdicts
from stages.tracking import runs
from stages.tracking.tags import git

ARTIFACT = "adapter"  # its name under `artifacts` in dvc.yaml
CHAMPION = "champion"  # MLflow's alias of the version that was released last


def main(version: str) -> None:
    from gto.versions import SemVer

    if not SemVer.is_valid(version or " "):
        raise UserError(f"'{version}' is not a version; write it as VERSION=v1.0.0")
    at, tag = outputs.read(), f"{ARTIFACT}@{version}"
    outputs.require(at.adapter, at.results, Path("dvc.lock"))
    if against := list(unready()):
        raise UserError("\n  ".join([f"{version} is not released:", *against]))
    head = git(Path(), "rev-parse", "HEAD")
    tagged = git(Path(), "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}")
    if tagged and tagged != head:
        raise UserError(f"{tag} is the commit {tagged[:7]}, not this one; choose a higher version")

    made = json.loads((at.adapter / "fingerprint.json").read_text(encoding="utf-8"))
    metrics = json.loads((at.results / "metrics.json").read_text(encoding="utf-8"))
    message = f"{ARTIFACT} {version}\n\n{verdicts.headline(metrics)}\n"
    message += f"SHA-256 of the weights: {made['adapter_sha256']}"
    words = ["git", "tag", "--annotate", "--message", message, tag]
    if not tagged and subprocess.run(words, check=False).returncode:
        raise UserError(f"Git did not make the tag {tag}, for the reason above")
    print(f"{message}\n\n{tag}: the tag of the commit {head[:7]}")
    known = {
        "version": version,
        "git.tag": tag,
        "git.commit": head,
        "dvc.path": at.adapter.as_posix(),
        "adapter_sha256": made["adapter_sha256"],
    }
    try:
        print(f"MLflow: {register(made['fingerprint'], known, message)}")
    except Exception as error:  # whatever a tracker raises, the release is there
        told = f"MLflow: not registered, {runs.reason(error)}; the same command tries it again"
        print(told, file=sys.stderr)
    print(f"others can get it after: git push origin {tag}")


def unready() -> Iterator[str]:
    """Why others would not get what is here by the current commit."""
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    changed = [line[3:] for line in git(Path(), "status", "--porcelain").splitlines()]
    if changed:
        yield f"changes are not committed: {listed(changed, 5, longest=200)}"
    if stale := outputs.stale():
        yield f"dvc.lock is not current: {listed(stale, 5)} would run again (`dvc repro`)"
    with Repo() as repo:
        # Others have the configuration of the commit: not config.local, nor this user's own.
        committed = repo.config.read("repo")
        name = committed.get("core", {}).get("remote")
        url = committed.get("remote", {}).get(name, {}).get("url")
        if not url:
            yield (
                "the committed .dvc/config names no remote, so nobody else would get the outputs "
                "(`dvc remote add -d storage …` without --local, commit it, `dvc push`)"
            )
        elif isinstance(url, RelPath):
            yield (
                f"the DVC remote {name} is a path relative to this clone, which others do not "
                f"have (`dvc remote modify {name} url {url}`, commit it)"
            )
        elif missing := unpushed(repo, name):
            yield f"the DVC remote lacks {listed(missing, 5, longest=200)} (`dvc push`)"


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


def register(fingerprint: str, known: Mapping[str, str], message: str) -> str:
    """The version in MLflow's registry, by reference to Git and DVC, and where it is there.

    It belongs to the newest run of the training that has results. Raises whatever MLflow does,
    ``LookupError`` where there is no such run.
    """
    client, experiment = runs.connect()
    name = client.get_experiment(experiment).name
    found = client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}'")
    with_results = [run.info.run_id for run in found if "results" in run.data.tags]
    if not with_results:
        raise LookupError("no run has these results (`make log` logs them)")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Adapters, by reference to Git and DVC.")
    versions = client.search_model_versions(f"name = '{name}'")
    number = next((v.version for v in versions if v.tags.get("version") == known["version"]), None)
    if number is None:
        source = f"runs:/{with_results[0]}/reports"
        more = {"run_id": with_results[0], "tags": dict(known), "description": message}
        number = client.create_model_version(name, source, await_creation_for=0, **more).version
    client.set_registered_model_alias(name, CHAMPION, number)
    return f"models:/{name}@{CHAMPION}"


if __name__ == "__main__":
    command.run(main)
