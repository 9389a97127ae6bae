"""Tag the adapter here as a version that others get by name, or upload a version to the Hub.

    make release VERSION=v1.0.0
    make publish VERSION=v1.0.0 REPO=owner/name    # PUBLIC=1: for everybody

To release takes the current commit with its outputs. Refused are changes that are not committed, a
``dvc.lock`` that is not current, and outputs that others could not get from the remote of the
committed configuration. Out: an annotated tag in GTO's form, ``adapter@v1.0.0``, which ``dvc
artifacts get`` and DVC Studio read. Git itself makes it, so that it is signed where your Git signs
tags (``tag.gpgSign``); the commit's dvc.lock has the hash of every output. Nothing is pushed: the
last line says how.

To publish takes the tag, whose files come from DVC's cache or remote, and a token with write access
(HF_TOKEN, or ``hf auth login``). Out: a model repository on the Hub, private unless asked
otherwise, with one commit and the version as its tag. It holds the adapter, whose configuration
names a base from the Hub by repository and commit, the card as README.md, page, numbers, dvc.lock
and parameters.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.commands import ADAPTER, BASE, CARD, PAGE, RESULTS, require, stale
from stages.core import command
from stages.core.errors import UserError, listed, of_the_hub
from stages.evaluation import catalogue
from stages.reporting import verdicts
from stages.reporting.card import terms_of
from stages.sources import source
from stages.tracking.tags import git

ARTIFACT = "adapter"  # its name under `artifacts` in dvc.yaml


def main(version: str, repo: str = "", public: str = "", accept: str = "") -> None:
    if repo:
        publish(repo, version, private=not public, accepted=bool(accept))
    else:
        release(version)


def release(version: str) -> None:
    """Tag the commit.

    Raises:
        UserError: others would not get what is here.
    """
    from gto.versions import SemVer

    if not SemVer.is_valid(version or " "):
        raise UserError(f"'{version}' is not a version; write it as VERSION=v1.0.0")
    tag = f"{ARTIFACT}@{version}"
    require(ADAPTER, RESULTS, Path("dvc.lock"))
    if against := list(unready()):
        raise UserError("\n  ".join([f"{version} is not released:", *against]))
    made = json.loads((ADAPTER / "fingerprint.json").read_text(encoding="utf-8"))
    metrics = json.loads((RESULTS / "metrics.json").read_text(encoding="utf-8"))
    message = f"{ARTIFACT} {version}\n\n{verdicts.title(metrics)} {catalogue.in_words(metrics)}\n"
    message += f"SHA-256 of the weights: {made['adapter_sha256']}"
    words = ["git", "tag", "--annotate", "--message", message, tag]
    if subprocess.run(words, check=False).returncode:
        raise UserError(f"Git did not make the tag {tag}, for the reason above")
    print(f"{message}\n\nto share it: git push origin {tag}")


def unready() -> Iterator[str]:
    """Why others would not get what is here by the current commit."""
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    changed = [line[3:] for line in git(Path(), "status", "--porcelain").splitlines()]
    if changed:
        yield f"changes are not committed: {listed(changed, 5, longest=200)}"
    if again := stale():
        yield f"dvc.lock is not current: {listed(again, 5)} would run again (`dvc repro`)"
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


def publish(repo: str, version: str, *, private: bool, accepted: bool = False) -> None:
    """Upload a released version.

    Raises:
        UserError: it was not released, a term of the data forbids it, which nobody ``accepted``, or
            the Hub refuses it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not a repository's name; write REPO=owner/name")
    tag = f"{ARTIFACT}@{version}"
    if not git(Path(), "tag", "--list", tag):
        raise UserError(f"there is no tag {tag}; `make release VERSION={version}` makes it")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, version)
        bundle(tag, folder)
        if not accepted:
            refuse_forbidden(folder / "params.yaml")
        upload(folder, repo, version, private=private)


def refuse_forbidden(parameters: Path) -> None:
    """Refuse an adapter that a term of its data rules out (``card.yaml``)."""
    sources = YAML(typ="safe").load(parameters.read_text(encoding="utf-8"))["data"]["sources"]
    for repo, term, forbids in terms_of(each.get("repo") for each in sources.values()):
        if forbids:
            raise UserError(
                f"not published: of {repo}, {term} This adapter is of another model; I_ACCEPT=1 "
                "publishes it if you know that you may"
            )


def bundle(tag: str, folder: Path) -> None:
    """Make the folder of what the Hub gets, of the files of a tag.

    Raises:
        UserError: they are neither in the cache nor in the remote.
    """
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=tag)
    names = {
        CARD: "README.md",
        PAGE: "report.html",
        RESULTS / "metrics.json": "metrics.json",
        BASE / source.FETCHED: source.FETCHED,
        **{Path(name): name for name in ("dvc.lock", "params.yaml", "requirements.txt")},
    }
    try:
        files.get(ADAPTER.as_posix(), folder.as_posix(), recursive=True)
        for path, name in names.items():
            files.get_file(path.as_posix(), (folder / name).as_posix())
    except Exception as error:  # DVC's and the remote's have no class in common
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{tag}: its files can't be read ({told}); `dvc pull` gets them") from error
    base = source.read(folder)
    (folder / source.FETCHED).unlink()
    if base.kind == "hub":
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base.repo, "revision": base.commit}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def upload(folder: Path, repo: str, version: str, *, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    api, page = HfApi(), f"{ENDPOINT}/{repo}"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"{page} exists and is public; set PUBLIC=1 if this version may be public too, or "
                "choose another repository"
            )
        done = api.upload_folder(folder_path=folder, repo_id=repo, commit_message=version)
        api.create_tag(repo, tag=version, revision=done.oid, exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        told = of_the_hub(error, f"the repository {repo}", page=page)
        if told is None:
            raise
        raise UserError(f"not published: {told}") from error
    print(f"{page}: {version}, {'private' if private else 'public'}")


if __name__ == "__main__":
    command.run(main)
